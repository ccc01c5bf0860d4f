"""Rows that reach a rank's experts in one micro-batch: what their memory follows, and an alarm.

A balance over the global batch says nothing of them: experts may be as busy as each other over a step, and
one rank's may get most rows of one micro-batch in one layer, all of which wait there for their backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer

from llada_megatron.config.families import formulas_of
from llada_megatron.config.schema import Config
from llada_megatron.model.router import BalancedRouter
from llada_megatron.parallel.dealing import data_parallel
from llada_megatron.parallel.ranks import gathered
from llada_megatron.runtime import device

AGAIN = 1.25
"""An alarm is repeated when the peak has grown by this since."""


class LoadFigures(NamedTuple):
    """Figures of a step over all ranks; None without experts."""

    load_max_over_mean: float | None
    """The busiest expert's load of the global batch over the mean load, of the worst layer."""
    expert_rows_max_over_mean: float | None
    """The most rows that a rank's experts got of a micro-batch in a layer, over their mean."""
    expert_rows_dropped: float | None
    """Share of all assignments that model.router.rows_cap dropped; None without it."""


class ExpertRows:
    """The most rows that this rank's experts got of a micro-batch in the step, by layer.

    A number of rows is a shape, which the host knows: watching costs nothing on the device.
    """

    def __init__(self, config: Config, model: Sequence[torch.nn.Module]) -> None:
        self.layout, self.model = config.layout, config.model
        self.most: dict[int, int] = {}
        """Counted from 1, as megatron-core's layers are."""
        layers = [part for chunk in model for part in chunk.modules() if isinstance(part, MoELayer)]
        self.routers = [cast(BalancedRouter, layer.router) for layer in layers]
        for layer in layers:
            layer.experts.register_forward_pre_hook(partial(self._seen, layer))

    def _seen(self, layer: MoELayer, experts: torch.nn.Module, given: tuple[Any, ...]) -> None:
        if experts.training:
            number = int(layer.layer_number)
            self.most[number] = max(self.most.get(number, 0), given[0].shape[0])

    def begin(self) -> None:
        """Forget the step before."""
        self.most.clear()
        for router in self.routers:
            router.dropped = None

    @property
    def has_losses(self) -> bool:
        """Whether routers have losses of their own, which `weigh_losses` has to weigh."""
        return self.model.has_experts and self.model.router.has_losses

    def weigh_losses(self, counts: Sequence[float] | None, sizes: Mapping[str, int]) -> None:
        """Bring the routers' own losses to means over the global batch.

        megatron-core divides all gradients by the loss's first count; counts: those of the global batch,
        sizes: of training.step.
        """
        if not self.has_losses or counts is None:
            return
        samples = self._samples(sizes)
        for router in self.routers:
            router.sequence_weight = counts[0] / samples
            router.row_weight = counts[0] / (samples * sizes["seq_length"])

    def _samples(self, sizes: Mapping[str, int]) -> int:
        return sizes["num_microbatches"] * sizes["micro_batch_size"] * data_parallel()[1]

    def mean(self, sizes: Mapping[str, int]) -> float:
        """Rows that each rank would get of a micro-batch if all got as many; sizes: of training.step.

        Each rank sends its rows' copies, and experts that are cut over etp ranks are on all of them.
        """
        rows = sizes["seq_length"] * sizes["micro_batch_size"] / (self.layout.cp * self.layout.tp)
        if coarse := formulas_of(self.model).coarse(self.model):
            rows /= coarse.tokens_per_row
        return rows * self.model.experts_per_token * self.layout.etp

    def figures(self, load: torch.Tensor, sizes: Mapping[str, int]) -> LoadFigures:
        """Of the step, over all ranks. load: this rank's largest, a scalar on its device."""
        if not self.model.has_experts:
            return LoadFigures(None, None, None)
        peak = max(self.most.values(), default=0) / self.mean(sizes)
        largest = torch.stack([load.double(), load.new_tensor(peak, dtype=torch.double)])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        load_over_mean, peak = largest.tolist()
        return LoadFigures(load_over_mean, peak, self._dropped(sizes) if self.model.router.rows_cap else None)

    def _dropped(self, sizes: Mapping[str, int]) -> float:
        counts = [router.dropped for router in self.routers if router.dropped is not None]
        dropped = torch.zeros((), dtype=torch.double, device=device.device())
        for count in counts:
            dropped += count
        dist.all_reduce(dropped)
        layers = self.model.layers - self.model.dense_layers
        return float(dropped) / (
            layers * self._samples(sizes) * sizes["seq_length"] * self.model.experts_per_token
        )


class RowsAlarm:
    """Says when the peak of rows passes a limit, and again only when it got worse."""

    def __init__(self, limit: float) -> None:
        self.limit = limit or float("inf")

    def raised(self, rows: ExpertRows, peak: float | None, step: int) -> tuple[str, dict[str, Any]] | None:
        """A sentence and an event's fields, or None; every rank calls it, with the same peak."""
        if peak is None or peak <= self.limit:
            return None
        self.limit = AGAIN * peak
        has_caps = formulas_of(rows.model).coarse(rows.model) is None  # a cap counts rows of tokens
        bound = "bound them with model.router.rows_cap, or " if has_caps else ""
        mine = max(((most, layer) for layer, most in rows.most.items()), default=(0, 0))
        (most, layer), rank = max((theirs, rank) for rank, theirs in enumerate(gathered(mine)))
        sentence = (
            f"step {step}: the experts of rank {rank} got {peak:.2f} times their mean of a micro-batch's rows"
            f" ({most:,}) in layer {layer}, and their memory grows with them. Where it gets short,"
            f" {bound}recompute them with layout.recompute=selective and"
            " layout.recompute_modules=[core_attn,moe]."
        )
        return sentence, {"step": step, "layer": layer, "rank": rank, "rows": most, "over_mean": peak}
