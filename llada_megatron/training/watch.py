"""Figures of a step by layer: gradients, weights, activations, routers, dead experts, and the largest logit.

Each rank adds up squares and counts of what it holds, on its device; one message after the step sums them
over all ranks. So no layout changes them but for the order of adding.

Legend: P parts of the model, as its family names them, S rows of B sequences or of one row of concepts, E
experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import unwrap_model
from torch import Tensor

from llada_megatron.config.families import formulas_of
from llada_megatron.config.schema import Config
from llada_megatron.model.gpt import layers_of
from llada_megatron.model.router import BalancedRouter
from llada_megatron.model.router_losses import expert_scores
from llada_megatron.runtime import device

SUMS = ("gradient", "weight", "activation", "activations", "entropy", "z", "rows", "unevenness", "sequences")
"""Columns of a part's sums: squares of the first three, how many activations; of a router's rows entropies,
squared log-sum-exps and their number; what sequence_balance learns from, and of how many sequences."""
FIGURES = (
    "grad_norm_by_layer",
    "weight_norm_by_layer",
    "activation_rms_by_layer",
    "router_entropy_by_layer",
    "router_z_by_layer",
    "dead_experts_by_layer",
    "router_unevenness_by_layer",
)
"""Lists of P numbers in the order of a forward; None where a part has no such figure."""


class Watch:
    """Adds up, in every training.figures_every_steps-th step, what `figures` then says."""

    def __init__(self, config: Config, model: Sequence[torch.nn.Module]) -> None:
        self.watched = formulas_of(config.model).watched(config.model)
        self.every = config.training.figures_every_steps
        self.place = {name: place for place, name in enumerate(self.watched.parts)}
        self.experts = config.model.experts if config.model.has_experts else 0
        self.is_on = False
        self.part_of: dict[torch.nn.Parameter, int] = {}
        if self.every:
            for chunk in unwrap_model(list(model)):
                self._watch(chunk)

    def _watch(self, chunk: Any) -> None:
        for module, name in self.watched.layers.items():
            stack, is_padded = getattr(chunk, module), module == self.watched.padded
            for layer in stack.modules():
                if isinstance(layer, TransformerLayer):
                    part = self.place[f"{name} {layer.layer_number}"]
                    self.part_of |= dict.fromkeys(layer.parameters(), part)
                elif isinstance(layer, BalancedRouter):
                    part = self.place[f"{name} {layer.layer_number}"]
                    layer.observer = partial(self._routed, part, is_padded, layer)
            for layer in layers_of(stack):
                ran = partial(self._layer_ran, self.place[f"{name} {layer.layer_number}"], is_padded)
                layer.register_forward_hook(ran, with_kwargs=True)
        for module, name in self.watched.others.items():
            for parameter in getattr(chunk, module, torch.nn.Module()).parameters():
                self.part_of.setdefault(parameter, self.place[name])
        if chunk.post_process:
            chunk.output_layer.register_forward_hook(self._head_ran)

    def begin(self, step: int) -> None:
        """Start anew; whether this step is watched."""
        self.is_on = bool(self.every) and step % self.every == 0
        if self.is_on:
            P, where = len(self.place), {"dtype": torch.double, "device": device.device()}
            self.sums = torch.zeros(P, len(SUMS), **where)
            self.rows_PE = torch.zeros(P, self.experts, **where)
            self.largest_logit = torch.full((), -torch.inf, **where)

    def _add(self, part: int, name: str, value: Tensor | float) -> None:
        self.sums[part, SUMS.index(name)].add_(value)

    def _learns(self) -> bool:
        """Whether the forward that runs counts: recompute runs a layer twice, evaluation learns nothing."""
        return self.is_on and torch.is_grad_enabled()

    def _layer_ran(
        self, part: int, is_padded: bool, layer: torch.nn.Module, given: Any, options: Any, output: Any
    ) -> None:
        if not self._learns():
            return
        hidden_SBH = output[0].detach()
        if is_padded:
            hidden_SBH = hidden_SBH.masked_fill(options["padding_mask"].T[..., None], 0)
            self._add(part, "activations", -hidden_SBH.shape[-1] * options["padding_mask"].sum())
        self._add(part, "activation", _square(hidden_SBH))
        self._add(part, "activations", hidden_SBH.numel())

    def _head_ran(self, head: torch.nn.Module, given: Any, output: Any) -> None:
        if self._learns() and output[0].numel():  # a context-parallel rank may supervise nothing
            torch.maximum(self.largest_logit, output[0].detach().amax().double(), out=self.largest_logit)

    def _routed(
        self,
        part: int,
        is_padded: bool,
        router: BalancedRouter,
        logits: Tensor,
        map_NE: Tensor,
        ignored_SB: Tensor | None,
    ) -> None:
        """logits fp32 [S, B, E]; map_NE bool [N, E], before any cap; ignored_SB bool: padding."""
        if not self._learns():
            return
        logits = logits.detach()
        share = expert_scores(logits, router.score_function)
        share /= share.sum(dim=-1, keepdim=True)
        entropy_SB = torch.special.entr(share).sum(dim=-1, dtype=torch.double)
        z_SB = logits.logsumexp(dim=-1).square()
        if is_padded and ignored_SB is not None:
            entropy_SB, z_SB = (each.masked_fill(ignored_SB, 0) for each in (entropy_SB, z_SB))
            map_NE = map_NE & ~ignored_SB.reshape(-1, 1)
            self._add(part, "rows", -ignored_SB.sum())
        self._add(part, "entropy", entropy_SB.sum(dtype=torch.double))
        self._add(part, "z", z_SB.sum(dtype=torch.double))
        self._add(part, "rows", map_NE.shape[0])
        self.rows_PE[part].add_(map_NE.sum(dim=0))
        if router.unevenness is not None:
            self._add(part, "unevenness", router.unevenness)
            self._add(part, "sequences", logits.shape[1] / router.tp_cp_group.size())  # each has a part

    @torch.no_grad()
    def norms(self, optimizer: MegatronOptimizer) -> None:
        """Add the squares of gradients, before they are clipped, and of the weights that they are of.

        Each weight counts on one rank: the distributed optimizer's shards do not overlap, and what
        tensor-parallel ranks hold alike counts on the first. Frozen weights have no shard.
        """
        if not self.is_on:
            return
        shards = [
            (self.part_of[parameter], shard)
            for parameter, shard, group in _shards(optimizer)
            if shard.grad is not None
            and shard.numel()
            and param_is_not_shared(shard)
            and param_is_not_tensor_parallel_duplicate(shard, **group)
        ]
        if not shards:
            return
        parts = torch.tensor([part for part, _ in shards], device=self.sums.device)
        for column, tensors in (
            ("gradient", [shard.grad for _, shard in shards]),
            ("weight", [shard for _, shard in shards]),
        ):
            norms = torch.stack(torch._foreach_norm(tensors)).double()
            self.sums[:, SUMS.index(column)].index_add_(0, parts, norms.square())

    def figures(self) -> dict[str, Any]:
        """FIGURES and `largest_logit` of the step over all ranks; nothing where it was not watched.

        Of the logits the largest one that a supervised position had, the mask token's included. Dead experts
        are those that no row of the global batch chose.
        """
        if not self.is_on:
            return {}
        largest = torch.zeros(dist.get_world_size(), dtype=torch.double, device=self.sums.device)
        largest[dist.get_rank()] = self.largest_logit  # each rank's own place: a sum finds the maximum
        message = torch.cat([self.sums.flatten(), self.rows_PE.flatten(), largest])
        dist.all_reduce(message)
        sums, rows, largest = message.cpu().split([self.sums.numel(), self.rows_PE.numel(), len(largest)])
        by_name = dict(zip(SUMS, sums.view(-1, len(SUMS)).T, strict=True))
        dead = (rows.view(len(self.place), -1) == 0).sum(dim=1)
        has_router = by_name["rows"] > 0
        lists = (
            by_name["gradient"].sqrt().tolist(),
            by_name["weight"].sqrt().tolist(),
            _means(by_name["activation"], by_name["activations"], root=True),
            _means(by_name["entropy"], by_name["rows"]),
            _means(by_name["z"], by_name["rows"]),
            [int(count) if has else None for count, has in zip(dead, has_router, strict=True)],
            _means(by_name["unevenness"], by_name["sequences"]),
        )
        return {**dict(zip(FIGURES, lists, strict=True)), "largest_logit": float(largest.max())}


def _square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).double().square()


def _means(sums: Tensor, counts: Tensor, *, root: bool = False) -> list[float | None]:
    means = sums / counts.clamp(min=1)
    means = means.sqrt() if root else means
    return [mean if count else None for mean, count in zip(means.tolist(), counts.tolist(), strict=True)]


def _shards(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, Tensor, dict[str, Any]]]:
    """Each parameter that is trained, this rank's fp32 shard of it, and the groups that hold it alike."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.is_stub_optimizer:
            continue
        group = {"tp_group": part.tp_group, "expert_tp_group": part.expert_tp_group}
        for wholes, shards in (
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        ):
            for of_whole, of_shard in zip(wholes, shards, strict=True):
                for parameter, shard in zip(of_whole, of_shard, strict=True):
                    yield parameter, shard, group
