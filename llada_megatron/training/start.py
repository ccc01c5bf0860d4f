"""What a start asks of this machine before it builds a model, and says once it has built it.

`llada train --check` and `llada doctor` ask it too.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.attention import select_backend
from llada_megatron.attention.portable import portable_attention
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import AttentionBackend, Config
from llada_megatron.model import speed
from llada_megatron.model.specs import layer_spec_line, resolve_layer_spec
from llada_megatron.runtime import adamw, device

FUSIONS = {
    "moe_grouped_gemm": "experts",
    "moe_permute_fusion": "permutation",
    "moe_router_fusion": "router",
    "bias_activation_fusion": "SwiGLU",
    "apply_rope_fusion": "rotary",
}
"""megatron-core's switches, in words; those that begin with `moe` are of experts."""
OUTSIDE_LAYERS = ("weight gradients", "cross entropy")
"""What model.fusions fuses where TransformerConfig has no say."""


def attention_line(config: Config) -> str:
    """Which executor of attention a run uses here and why not a faster one; BadInput when it cannot."""
    model, dtype = config.model, device.DTYPES[config.precision.dtype]
    return training_executor(model.attention_backend, dtype, model.head_dim, model.value_dim)


def training_executor(
    backend: AttentionBackend, dtype: torch.dtype, head_dim: int, value_dim: int | None = None
) -> str:
    """The executor that trains with such heads here, and why; BadInput where there is none.

    Values are `value_dim` wide, by default as wide as keys.

    On CUDA `portable` is none: its loops run in Python, in fp32, with a launch for each small product.
    """
    executor, line = select_backend(backend, device.device(), dtype, head_dim, value_dim=value_dim)
    if executor is portable_attention and device.on_cuda():
        raise BadInput(
            "model.attention_backend=portable does not train on CUDA, where its loops in Python would take"
            f" nearly all of a step ({line}): set model.attention_backend=auto, precision=bf16 and a head_dim"
            " of 16 or more."
        )
    return line


def check_layers(config: Config) -> None:
    """Raise BadInput where model.layer_spec cannot be served: a package is missing, or it has no adapters."""
    resolve_layer_spec(config.model)


def engine_lines(config: Config, built: TransformerConfig) -> list[str]:
    """Layers, experts, optimizer and attention of a model that was built, a line for each."""
    model = config.model
    names = {switch: name for switch, name in FUSIONS.items() if model.has_experts or "moe" not in switch}
    fused = [name for switch, name in names.items() if getattr(built, switch)]
    plain = [name for name in names.values() if name not in fused]
    is_fused = speed.fused(config, layer_spec=resolve_layer_spec(model))
    (fused if is_fused else plain).extend(OUTSIDE_LAYERS)
    said = [
        f"layers    {layer_spec_line(model)}; fused: {', '.join(fused) or 'none'};"
        f" not fused: {', '.join(plain) or 'none'}"
    ]
    if model.has_experts:
        layout = config.layout
        overlapped = ", overlapped" if layout.overlap_experts or layout.overlap_shared_experts else ""
        said.append(
            f"experts   {model.experts} over ep {layout.ep}, {layout.dispatcher} dispatcher{overlapped}"
        )
    return [*said, f"optimizer {optimizer_line()}", f"attention {attention_line(config)}"]


def optimizer_line() -> str:
    """Whose AdamW a run here uses; on CUDA how to get a faster one."""
    is_plain = adamw.in_use() == adamw.NAMES["llada_megatron"]
    faster = ": TransformerEngine's needs pip install '.[cuda]'" if is_plain and device.on_cuda() else ""
    return f"{adamw.in_use()}{faster}"
