"""Kernels that the host starts for a layer: a layer takes at least that long.

Counted off the dry run: operations that the local layers dispatch, views and allocations left out, in models
that differ by a layer and by experts. Fused kernels of TransformerEngine (model.fusions) take the place of
those that they join, and its grouped product starts one per expert and product; no GPU has counted them.
"""

from __future__ import annotations

from collections.abc import Collection

from llada_megatron.config.choices import CudaGraphPart
from llada_megatron.config.schema import LayoutConfig, ModelConfig
from llada_megatron.plan.rates import Rates

Kernels = tuple[int, int]
"""Forward, backward."""

ATTENTION: Kernels = (34, 40)
"""With norms, residuals and rotary, which is 25 of the first."""
DENSE: Kernels = (4, 8)
ROUTER: Kernels = (19, 14)
PREPROCESS: Kernels = (8, 4)
"""Counts of tokens, and the order of their copies."""
EXCHANGE: Kernels = (10, 10)
SHARED: Kernels = (3, 6)
EXPERT: Kernels = (3, 8)
"""Of each on the process."""
FUSED_ATTENTION: Kernels = (12, 18)
FUSED_ROUTER: Kernels = (6, 6)
FUSED_EXPERT: Kernels = (2, 4)
"""Two products, and two gradients of each."""
CAPTURED: Kernels = (1, 1)


def kernels(
    model: ModelConfig, layout: LayoutConfig, at: Rates, again: Collection[str], *, moe: bool
) -> Kernels:
    """Of one layer and micro-batch; a captured part (training.cuda_graphs) is one start each way.

    again: modules that backward computes anew, of which those that are a few kernels are not counted.
    """
    parts = [("attention", FUSED_ATTENTION if at.fused else ATTENTION)]
    if not moe:
        parts.append(("mlp", CAPTURED if CudaGraphPart.mlp in at.graphs else DENSE))
        return _sum(parts, again)
    router = FUSED_ROUTER if at.fused else ROUTER
    parts.append(("moe", CAPTURED if CudaGraphPart.moe_router in at.graphs else router))
    parts.append(("moe", CAPTURED if CudaGraphPart.moe_preprocess in at.graphs else PREPROCESS))
    here, expert = model.experts // layout.ep, FUSED_EXPERT if at.fused else EXPERT
    parts += [("moe", EXCHANGE), ("moe", (here * expert[0], here * expert[1]))]
    if model.shared_expert_hidden_size:
        parts.append(("shared_experts", SHARED))
    return _sum(parts, again)


def _sum(parts: list[tuple[str, Kernels]], again: Collection[str]) -> Kernels:
    forward = sum(there for _, (there, _) in parts)
    return forward, sum(back + there * (module in again) for module, (there, back) in parts)
