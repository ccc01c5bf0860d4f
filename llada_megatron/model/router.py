"""megatron-core's router with counts of our own: which tokens weigh in the balance, and by whose update.

Legend: N rows of a micro-batch on this rank, E experts, k experts of a row, R ranks that share the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from llada_megatron.config.router import RouterConfig
from llada_megatron.model import pools
from llada_megatron.model.router_losses import also_learn, expert_scores, sequence_balance, squared_log_sums

UNCAPPED = 2.0
"""moe_expert_capacity_factor / experts where `rows_cap` is set: it tells megatron-core's dispatcher that rows
may have fewer than k experts (token_dispatcher.py:539), and is too large for its own cap to drop any."""


class BalancedRouter(TopKRouter):
    """Routes as megatron-core does and counts, per expert, the tokens that balancing should see.

    training/balance.py reads `local_tokens_per_expert` and moves `expert_bias` from counts of the global
    batch; megatron-core's own update, which has no zero-mean form, is off.
    """

    def __init__(self, *args: Any, settings: RouterConfig, expert_capacity: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frozen_expert_bias = True
        if not self.enable_expert_bias:  # megatron-core counts for the bias alone
            del self.local_tokens_per_expert
            counts = self.weight.new_zeros(self.config.num_moe_experts, dtype=torch.float32)
            self.register_buffer("local_tokens_per_expert", counts, persistent=False)
        self.settings = settings
        self.expert_capacity = expert_capacity
        self.row_weight = self.sequence_weight = 0.0
        """Of a row in z_loss, and of a sequence in sequence_balance: set by every step (training/step.py)."""
        self.unevenness: Tensor | None = None
        """The last forward's part of the sum over sequences that sequence_balance learns from."""
        self.observer: Callable[[Tensor, Tensor, Tensor | None], None] | None = None
        """Sees the logits [S, B, E] and assignments bool [N, E] of each forward, before any cap, and which
        rows the balance leaves out, bool [S, B]."""
        self.dropped: Tensor | None = None
        """Assignments that `rows_cap` dropped here since somebody last cleared it, a scalar; None: none."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights fp32 [N, E] and assignments bool [N, E] of the rows of logits [S, B, E].

        padding_mask: bool [S, B], True for rows that the balance leaves out; with block routing the marks
        [S, B, 1 + w] of model/pools.py. What `rows_cap` drops has been counted for the balance: it is what
        wanted to come. Evaluation drops nothing.
        """
        if padding_mask is not None and len(padding_mask) > len(logits):
            padding_mask = None  # behind the last attention there are none that the balance leaves out
        ignored_SB = padding_mask
        if self.expert_capacity:
            assert padding_mask is not None
            ignored_SB = padding_mask[..., 0]
        if self.settings.has_losses and self.training and torch.is_grad_enabled():
            logits = self._with_losses(logits, ignored_SB)
        if self.expert_capacity:
            weight_NE, map_NE = self._from_pools(logits.flatten(0, 1), padding_mask)
        else:
            weight_NE, map_NE = super().routing(logits, ignored_SB)
        if self.observer is not None:
            self.observer(logits, map_NE, ignored_SB)
        most = self._most_rows(map_NE.shape[0])
        if most is None:
            return weight_NE, map_NE
        kept_NE = within_cap(weight_NE.detach(), map_NE, self.config.expert_model_parallel_size, most)
        if torch.is_grad_enabled():  # under recompute a layer runs twice
            dropped = (map_NE & ~kept_NE).sum()
            self.dropped = dropped if self.dropped is None else self.dropped + dropped
        return weight_NE * kept_NE, map_NE & kept_NE

    def _from_pools(self, logits_NE: Tensor, marks_SB: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and assignments [N, E] where the rows of a block choose from one pool of experts.

        With pools of all experts bit for bit what megatron-core gives without groups: the choice is made in
        its order, the weights are its own.
        """
        ignored_SB, block_N, blocks = pools.read_marks(marks_SB)
        k, in_order = self.config.moe_router_topk, torch.is_grad_enabled()  # moe_utils.py:823
        with torch.no_grad():
            score_NE = logits_NE.float().sigmoid() + self.expert_bias
            open_NE = pools.in_pool(score_NE, block_N, blocks, self.expert_capacity, self.tp_cp_group)
            chosen_Nk = open_NE.topk(k, dim=1, sorted=in_order).indices
        weight_NE, map_NE = topk_routing_with_score_function(
            logits_NE,
            k,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function="sigmoid",
            precomputed_indices=chosen_Nk,
        )
        self._apply_expert_bias(map_NE, ignored_SB.flatten())
        return weight_NE, map_NE

    def _with_losses(self, logits_SBE: Tensor, ignored_SB: Tensor | None) -> Tensor:
        """The logits, whose backward pass is that of the router's own losses as well.

        All rows have a z loss; the balance leaves out those that the bias does not count either.
        """
        settings = self.settings
        losses = []
        if settings.z_loss:
            losses.append(settings.z_loss * self.row_weight * squared_log_sums(logits_SBE))
        if settings.sequence_balance:
            k = self.config.moe_router_topk
            scores_SBE = expert_scores(logits_SBE, self.score_function)
            unevenness = sequence_balance(scores_SBE, ignored_SB, k, self.tp_cp_group)
            self.unevenness = unevenness.detach()
            losses.append(settings.sequence_balance * self.sequence_weight * unevenness)
        return also_learn(logits_SBE, torch.stack(losses).sum())

    def _most_rows(self, rows: int) -> int | None:
        """Of this rank's N k assignments, those that the experts of one rank take; None where all fit."""
        ranks, k = self.config.expert_model_parallel_size, self.config.moe_router_topk
        experts_there = self.config.num_moe_experts // ranks
        most = int(self.settings.rows_cap * rows * k / ranks)
        fits = not self.settings.rows_cap or most >= rows * min(k, experts_there)
        return None if fits or not self.training else most

    @torch.no_grad()
    def _maintain_float32_expert_bias(self) -> None:
        """Also of the counts: bf16, which Float16Module turns buffers into, counts no further than 256."""
        super()._maintain_float32_expert_bias()
        self.local_tokens_per_expert.data = self.local_tokens_per_expert.data.float()

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Add to the counts; routing_map bool [N, E], padding_mask bool [N], True for what does not count.

        Under recompute the layer runs twice, once without gradients: that pass and evaluation do not count.
        megatron-core's own method multiplies [N, E] by [N], which fits no shape.
        """
        if not torch.is_grad_enabled():
            return
        with torch.no_grad():
            if padding_mask is not None:
                routing_map = routing_map & ~padding_mask[:, None]
            self.local_tokens_per_expert += routing_map.sum(dim=0)


def within_cap(weight_NE: Tensor, map_NE: Tensor, ranks: int, most: int) -> Tensor:
    """Which assignments bool [N, E] stay when each of R ranks takes `most`: those of the highest weight.

    Rank r has the experts r E/R to (r + 1) E/R. Among equal weights, which masked tokens have in the first
    layers, earlier rows stay. Beyond what is assigned, anything may be True.
    """
    N, E = weight_NE.shape
    by_rank = weight_NE.masked_fill(~map_NE, -1).view(N, ranks, E // ranks).transpose(0, 1).reshape(ranks, -1)
    order = by_rank.argsort(dim=1, descending=True, stable=True)[:, :most]
    kept = torch.zeros_like(by_rank, dtype=torch.bool).scatter_(1, order, True)
    return kept.view(ranks, N, E // ranks).transpose(0, 1).reshape(N, E)
