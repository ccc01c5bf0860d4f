"""Kernels that the host starts for a layer: a layer takes at least that long.

Counted off the dry run: operations that the local layers dispatch, views and allocations left out, in models
that differ by a layer and by experts. Fused kernels of TransformerEngine (model.fusions) take the place of
those that they join, and its grouped product starts one per expert and product; no GPU has counted them.
"""

from __future__ import annotations

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


def kernels(model: ModelConfig, layout: LayoutConfig, at: Rates, *, moe: bool) -> Kernels:
    """Of one layer and micro-batch; a captured part (training.cuda_graphs) is one start each way."""
    parts = [FUSED_ATTENTION if at.fused else ATTENTION]
    if not moe:
        parts.append((1, 1) if CudaGraphPart.mlp in at.graphs else DENSE)
        return _sum(parts)
    router = FUSED_ROUTER if at.fused else ROUTER
    parts.append((1, 1) if CudaGraphPart.moe_router in at.graphs else router)
    parts.append((1, 1) if CudaGraphPart.moe_preprocess in at.graphs else PREPROCESS)
    here, expert = model.experts // layout.ep, FUSED_EXPERT if at.fused else EXPERT
    parts += [EXCHANGE, SHARED if model.shared_expert_hidden_size else (0, 0)]
    parts.append((here * expert[0], here * expert[1]))
    return _sum(parts)


def _sum(parts: list[Kernels]) -> Kernels:
    return sum(there for there, _ in parts), sum(back for _, back in parts)
