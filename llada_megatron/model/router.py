"""megatron-core's router with counts of our own: which tokens weigh in the balance, and by whose update."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter


class BalancedRouter(TopKRouter):
    """Routes as megatron-core does and counts, per expert, the tokens that balancing should see.

    training/balance.py reads `local_tokens_per_expert` and moves `expert_bias` from counts of the global
    batch; megatron-core's own update, which has no zero-mean form, is off.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frozen_expert_bias = True

    @torch.no_grad()
    def _maintain_float32_expert_bias(self) -> None:
        """Also of the counts: bf16, which Float16Module turns buffers into, counts no further than 256."""
        super()._maintain_float32_expert_bias()
        if self.local_tokens_per_expert is not None:
            self.local_tokens_per_expert.data = self.local_tokens_per_expert.data.float()

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Add to the counts; routing_map bool [N, E], padding_mask bool [N], True for what does not count.

        Under recompute the layer runs twice, once without gradients: that pass and evaluation do not count.
        megatron-core's own method multiplies [N, E] by [N], which fits no shape.
        """
        if not self.enable_expert_bias or not torch.is_grad_enabled():
            return
        with torch.no_grad():
            if padding_mask is not None:
                routing_map = routing_map & ~padding_mask[:, None]
            self.local_tokens_per_expert += routing_map.sum(dim=0)
