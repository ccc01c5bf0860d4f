"""Passes over memory that kernels of their own make where TransformerEngine would run one (model.fusions).

Counted off megatron-core 0.19.2's plain code, beyond what the fused kernels move. Legend: activations.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from llada_megatron.config.schema import LayoutConfig, ModelConfig
from llada_megatron.plan.shapes import Shape

ROTARY_PASSES = 10
"""Over rotated channels, each way: halves are negated and laid together (3), multiplied by cosines and sines
(4) and added (3). The fused kernel has its read and write in the copy of all channels that both make."""
ROUTER_PASSES = 38
"""Over fp32 scores of all experts, each way: about 20 operations that read and write them, fused one."""
ADDED_PASSES = 2
"""Over copies of tokens where they are added to rows in memory: each is read and written besides."""


def unfused_bytes(
    model: ModelConfig, shape: Shape, layout: LayoutConfig, *, moe: bool, rotary_alone: bool, b: int
) -> Iterator[tuple[str, float, float]]:
    """(side of the layer, bytes in forward, bytes in backward) of one layer.

    rotary_alone: the other fusions are on, but samples of a micro-batch have positions of their own, which
    TransformerEngine's rotary does not take (model/speed.py). Forward adds the experts' outputs to tokens,
    backward the gradients of the copies: unpermutation and the gradient of permutation are sums there.
    """
    turned = model.heads // layout.tp + (1 if model.mla.is_used else model.kv_heads // layout.tp)
    rotated = turned * model.rotated_channels
    rotary = ROTARY_PASSES * b * shape.rows * rotated
    yield "attention", rotary, rotary
    if moe and not rotary_alone:
        router = ROUTER_PASSES * 4 * shape.tokens * model.experts
        yield "attention", router, router
        copies = ADDED_PASSES * b * shape.sent * model.hidden_size
        yield "experts", copies, copies
