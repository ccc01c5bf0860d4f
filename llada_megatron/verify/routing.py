"""How close a run came to routing a token otherwise: rounding can flip a choice below this margin."""

from __future__ import annotations

from typing import Any

import torch

from llada_megatron.model import pools
from llada_megatron.model.router_losses import expert_scores


class RoutingMargin:
    """Watches routers and keeps the smallest gap between a chosen and a rejected score.

    Scores are those of model.expert_score plus expert_bias, as megatron-core compares them: first groups,
    by the sum of their best experts, then experts of the chosen groups. With block routing first the experts
    of each block by their best score, then those of its pool.
    """

    def __init__(self, routers: list[Any]) -> None:
        self.smallest = float("inf")
        for router in routers:
            router.register_forward_pre_hook(self._watch)

    @torch.no_grad()
    def _watch(self, router: Any, arguments: tuple[Any, ...]) -> None:
        config = router.config
        logits = router.gating(arguments[0]).flatten(0, -2)
        scores = expert_scores(logits, router.score_function)  # [tokens, E]
        if router.expert_bias is not None:
            scores = scores + router.expert_bias
        if config.moe_router_num_groups:
            chosen = config.moe_router_group_topk
            by_group = scores.unflatten(1, (config.moe_router_num_groups, -1))
            group_score = by_group.topk(config.moe_router_topk // chosen, dim=2).values.sum(dim=2)
            self._keep(group_score, chosen)
            kept = torch.zeros_like(group_score).scatter(1, group_score.topk(chosen, dim=1).indices, 1.0)
            scores = by_group.masked_fill(kept[..., None] == 0, float("-inf")).flatten(1)
        if router.expert_capacity:
            _, block, blocks = pools.read_marks(arguments[1].bool())
            best = pools.best_scores(scores, block, blocks, router.tp_cp_group)
            self._keep(best[best[:, 0] > float("-inf")], router.expert_capacity)
            scores = scores.masked_fill(~pools.pools_of(best, router.expert_capacity)[block], float("-inf"))
        self._keep(scores, config.moe_router_topk)

    def _keep(self, scores: torch.Tensor, chosen: int) -> None:
        if chosen < scores.shape[1]:
            best = scores.topk(chosen + 1, dim=1).values
            self.smallest = min(self.smallest, float((best[:, -2] - best[:, -1]).min()))
