"""What layout.offload_modules keeps in host memory between forward and backward.

megatron-core copies what the named parts save for backward to pinned memory while later parts run, and back
before backward needs it (fine_grained_activation_offload.py). Legend as in activations.py.
"""

from __future__ import annotations

from llada_megatron.config.choices import OffloadModule
from llada_megatron.config.schema import LayoutConfig, ModelConfig
from llada_megatron.plan.activations import Parts
from llada_megatron.plan.shapes import Shape


def offloaded(model: ModelConfig, left: Parts, shape: Shape, layout: LayoutConfig, *, b: int) -> Parts:
    """Bytes of one layer by part of the model, of what recompute has left of it.

    attn_norm and mlp_norm  b tH of the residual each     qkv_linear  b tH of the norms' outputs
    core_attn   b S(q + g) of rotated queries and keys (values stay: they lie among the projections; with
                model.mla they go too)
    attn_proj   b S v of attention's output                expert_fc1  b NH of the experts' inputs
    moe_act     2b N Fe/etp of gate and up
    """
    q, g = (heads * model.head_dim // layout.tp for heads in (model.heads, model.kv_heads))
    v = model.heads * model.value_dim // layout.tp
    own_values = v if model.mla.is_used else 0
    hidden, rows = b * shape.tokens * model.hidden_size, b * shape.rows
    moved = {
        OffloadModule.attn_norm: [("residual", hidden)],
        OffloadModule.mlp_norm: [("residual", hidden)],
        OffloadModule.qkv_linear: [("norms", hidden)],
        OffloadModule.core_attn: [("attention", rows * q), ("core_attn", rows * (g + own_values))],
        OffloadModule.attn_proj: [("attention", rows * v)],
        OffloadModule.expert_fc1: [("experts", b * shape.routed * model.hidden_size)],
        OffloadModule.moe_act: [("experts", 2 * b * shape.routed * model.expert_hidden_size // layout.etp)],
    }
    result: Parts = {}
    for module in layout.offload_modules:
        for part, size in moved[module]:
            result[part] = min(left.get(part, 0), result.get(part, 0) + size)
    return {part: size for part, size in result.items() if size}
