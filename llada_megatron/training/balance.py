"""Loss-free load balancing (Wang et al., arXiv 2408.15664): a bias per expert, moved by the global load."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads

from llada_megatron.config.schema import ModelConfig
from llada_megatron.model.router import BalancedRouter
from llada_megatron.runtime import device


class ExpertBalance:
    """Counts tokens per expert over a global batch and updates the biases, if any, once per step.

    megatron-core's own update has no zero-mean form, so the biases are frozen for it and moved here.
    """

    def __init__(self, model: list[torch.nn.Module], settings: ModelConfig) -> None:
        self.routers = [
            module for stage in model for module in stage.modules() if isinstance(module, BalancedRouter)
        ]
        self.rate, self.zero_mean = settings.expert_bias_update_rate, settings.expert_bias_zero_mean
        self.has_biases = settings.expert_bias
        self.tokens_RE: torch.Tensor | None = None  # [routers of this rank, experts]

    def finalize(self, model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
        """Stands in for megatron-core's `finalize_model_grads`."""
        if self.routers:
            self.tokens_RE = torch.stack([router.local_tokens_per_expert for router in self.routers])
            dist.all_reduce(
                self.tokens_RE,
                group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
            )
            for router in self.routers:
                router.local_tokens_per_expert.zero_()
        finalize_model_grads(model, *args, **kwargs)

    @torch.no_grad()
    def update(self) -> None:
        """b_e <- b_e + rate * sign(mean load - load_e), minus the mean of the change if asked.

        The bias of a frozen router is frozen with it.
        """
        if self.tokens_RE is None or not self.has_biases:
            return
        change = self.rate * torch.sign(self.tokens_RE.mean(dim=1, keepdim=True) - self.tokens_RE)
        if self.zero_mean:
            change -= change.mean(dim=1, keepdim=True)
        for router, step in zip(self.routers, change, strict=True):
            if router.weight.requires_grad:
                router.expert_bias.add_(step)

    def load_max_over_mean(self) -> torch.Tensor:
        """The busiest expert's load over the mean load, of this pipeline stage's worst layer; a scalar."""
        if self.tokens_RE is None:  # no experts here
            return torch.zeros((), device=device.device())
        return (self.tokens_RE.amax(dim=1) / self.tokens_RE.mean(dim=1).clamp(min=1)).max()
