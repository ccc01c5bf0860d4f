"""Every legal layout on a cluster, ranked by the hours of the whole schedule, and why the others fall out.

The axes are filled in one after the other: tp, cp, etp, ep, pp with vpp and the layers of each stage, then
micro-batch and recompute. Each choice goes through the rules of layouts with the axes that are still open at
1 (a refusal holds whatever they become), each whole layout through rules.check, the validation of training.
What is left must fit into memory. The search leaves out what its constants bound, and etp that does not
divide tp.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from llada_megatron.config import rules
from llada_megatron.config.choices import Recompute, RecomputeModule
from llada_megatron.config.errors import BadInput
from llada_megatron.config.families import formulas_of
from llada_megatron.config.layout_rules import check_layout
from llada_megatron.config.quantities import GB
from llada_megatron.config.schedule import Schedule
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.plan.planner import Placement, Planner
from llada_megatron.plan.shapes import keeps_blocks_whole
from llada_megatron.plan.topology import gpus, groups

ONE: dict[str, Any] = dict.fromkeys(("tp", "pp", "vpp", "cp", "ep", "etp", "micro_batch"), 1)
MIN_TOKENS_PER_PROCESS = 1024
"""Context parallelism does not cut sequences into fewer data tokens than this."""
MICRO_BATCHES = (1, 2, 4, 8)
VIRTUAL_STAGES = (1, 2, 4, 8)
RecomputeChoice = tuple[Recompute, tuple[RecomputeModule, ...]]
RECOMPUTE: tuple[RecomputeChoice, ...] = (
    (Recompute.none, ()),
    (Recompute.selective, (RecomputeModule.layernorm, RecomputeModule.moe_act)),
    (Recompute.selective, (RecomputeModule.mlp, RecomputeModule.shared_experts)),
    (Recompute.selective, (RecomputeModule.mlp, RecomputeModule.moe)),
    (Recompute.full, ()),
)
"""Where the first fits nothing is faster; else the fastest of those that fit is taken."""
OF_LATENTS: tuple[RecomputeChoice, ...] = (
    (Recompute.selective, (RecomputeModule.layernorm, RecomputeModule.mla_up_proj)),
    (
        Recompute.selective,
        (RecomputeModule.layernorm, RecomputeModule.mla_up_proj, RecomputeModule.moe_act),
    ),
)
"""Further ones of model.mla; DeepSeek-V3 was trained with the second (arXiv 2412.19437, section 3.2.3)."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits."""

    layout: LayoutConfig
    hours: float
    tokens_per_sec: float
    peak_bytes: int
    """On the fullest process."""


@dataclass
class Rejection:
    """Layouts, or choices that rule out all layouts with them, that fall out for one reason."""

    reason: str
    count: int = 0
    example: str = ""
    """The one that needs the fewest bytes where bytes are the reason, else the first."""
    needed: int | None = None
    """Bytes of the example."""


@dataclass
class Result:
    """What a search found."""

    gpus: int
    usable_bytes: int
    candidates: list[Candidate] = field(default_factory=list)
    """The fastest first."""
    rejections: dict[str, Rejection] = field(default_factory=dict)

    def reject(self, reason: str, example: str, needed: int | None = None) -> None:
        """Count one more that falls out for `reason`."""
        rejection = self.rejections.setdefault(reason, Rejection(reason, 0, example, needed))
        rejection.count += 1
        if needed is not None and rejection.needed is not None and needed < rejection.needed:
            rejection.example, rejection.needed = example, needed


class Search:
    """One search; `run` does it."""

    def __init__(self, planner: Planner) -> None:
        config = planner.config
        self.planner, self.config, self.model = planner, config, config.model
        self.result = Result(gpus(config.cluster), self.planner.usable_bytes)
        self.start = replace(
            config.layout,
            processes=gpus(config.cluster),
            **ONE,
            pipeline=[],
            recompute=Recompute.none,
        )
        self.ways = _divisors(self.start.processes)
        self.schedules = {size: self._schedule(size) for size in MICRO_BATCHES}

    def run(self) -> Result:
        """Search, and rank by hours, then by memory, then by the axes themselves."""
        tp, cp, etp, ep = (self._ways_alone(axis) for axis in ("tp", "cp", "etp", "ep"))
        self._refuse_long_pipelines()
        of_latents = OF_LATENTS if self.model.mla.is_used else ()
        choices = (*RECOMPUTE[:-1], *of_latents, RECOMPUTE[-1])
        recompute = [choice for choice in choices if self._legal(_recomputing(self.start, choice))]
        for layout in self._with(self._with([self.start], "tp", tp), "cp", cp):
            inside = [way for way in etp if layout.tp % way == 0]
            for whole in self._with(self._with([layout], "etp", inside), "ep", ep):
                head_in_layers = self._head_in_layers(whole)
                for structure in self._pipelines(whole, head_in_layers):
                    self._fill(structure, recompute)
        self.result.candidates.sort(key=lambda one: (one.hours, one.peak_bytes, describe(one.layout)))
        return self.result

    def _schedule(self, micro_batch: int) -> Schedule:
        return rules.schedule_of(replace(self.config, layout=replace(self.start, micro_batch=micro_batch)))

    def _ways_alone(self, axis: str) -> list[int]:
        """Values of an axis that are legal while all others are 1."""
        ways = self.ways if axis in ("tp", "cp") or self.model.has_experts else [1]
        legal = [way for way in ways if self._legal(_with_axis(self.start, axis, way))]
        if axis != "cp":
            return legal
        stages = self.schedules[min(self.schedules)].stages
        length = min(stage.sequence_length for stage in stages)
        for way in [way for way in legal if way > 1 and length // way < MIN_TOKENS_PER_PROCESS]:
            reason = (
                f"cp leaves a process fewer than {MIN_TOKENS_PER_PROCESS} data tokens (limit of the search)"
            )
            self.result.reject(reason, f"cp {way}: {length // way} tokens")
            legal.remove(way)
        return legal

    def _with(self, layouts: Iterable[LayoutConfig], axis: str, ways: list[int]) -> Iterator[LayoutConfig]:
        for layout in layouts:
            for way in ways:
                candidate = _with_axis(layout, axis, way)
                if way == 1 or self._legal(candidate):
                    yield candidate

    def _legal(self, layout: LayoutConfig) -> bool:
        """Whether the rules of layouts accept it, micro-batches aside: those depend on axes that are open."""
        try:
            check_layout(replace(self.config, layout=layout))
            formulas_of(self.model).check_layout(replace(self.config, layout=layout))
        except BadInput as refusal:
            self.result.reject(_reason(refusal), f"{describe(layout)}: {refusal}")
            return False
        return True

    def _pipelines(self, layout: LayoutConfig, head_in_layers: float) -> Iterator[LayoutConfig]:
        """Every pp and vpp, with even stages and with stages balanced against the head."""
        layers = self.model.layers
        for pp in [way for way in self.ways if way <= layers]:
            for vpp in VIRTUAL_STAGES if pp > 1 else (1,):
                if pp * vpp > layers:
                    continue
                balanced = balanced_stages(layers, pp, vpp, head_in_layers)
                pipelines: list[list[int]] = [] if layers % (pp * vpp) else [[]]
                if pp > 1 and (not pipelines or len(set(balanced)) > 1):
                    pipelines.append(balanced)
                for pipeline in pipelines:
                    candidate = replace(layout, pp=pp, vpp=vpp, pipeline=pipeline)
                    if pp == 1 or self._legal(candidate):
                        yield candidate

    def _refuse_long_pipelines(self) -> None:
        for pp in self.ways:
            if pp > self.model.layers:
                self._legal(replace(self.start, pp=pp))

    def _head_in_layers(self, layout: LayoutConfig) -> float:
        """Seconds of the head over those of the last layer, over the whole schedule."""
        links, head, layer = groups(layout, self.config.cluster), 0.0, 0.0
        for stage in self.schedules[1].stages:
            dense, moe, _, last = self.planner.blocks(layout, stage, links).totals
            head += stage.tokens * last
            layer += stage.tokens * (moe if self.model.has_experts else dense)
        return head / layer if layer else 0.0  # a family without a pipeline times no layer alone

    def _fill(self, structure: LayoutConfig, recompute: list[RecomputeChoice]) -> None:
        """Micro-batches of a structure, each with the recompute that fits and is fastest."""
        placement = self.planner.place(structure)
        static = [sum(parts.values()) for parts in placement.static]
        if max(static) > self.planner.usable_bytes:
            self._too_large(structure, static.index(max(static)), max(static), "even without activations")
            return
        for micro_batch, schedule in self.schedules.items():
            layout = replace(structure, micro_batch=micro_batch)
            try:
                rules.check(replace(self.config, layout=layout))
            except BadInput as refusal:
                self.result.reject(_reason(refusal), f"{describe(layout)}: {refusal}")
                continue
            if not self._fits(layout, placement, schedule, static, recompute):
                return  # larger micro-batches need more

    def _fits(
        self,
        layout: LayoutConfig,
        placement: Placement,
        schedule: Schedule,
        static: list[int],
        recompute: list[RecomputeChoice],
    ) -> bool:
        fitting = []
        smallest, rank = 0, 0
        for choice in recompute:
            chosen = _recomputing(layout, choice)
            smallest, rank = self._peak(chosen, placement, schedule, static)
            if smallest <= self.planner.usable_bytes:
                fitting.append(self._candidate(chosen, placement, schedule, smallest))
                if chosen.recompute is Recompute.none:
                    break
        if fitting:
            self.result.candidates.append(min(fitting, key=lambda one: one.hours))
        else:
            self._too_large(layout, rank, smallest, "even with full recompute")
        return bool(fitting)

    def _candidate(
        self, layout: LayoutConfig, placement: Placement, schedule: Schedule, peak: int
    ) -> Candidate:
        seconds = sum(
            stage.steps * self.planner.step(layout, placement, stage).total for stage in schedule.stages
        )
        return Candidate(layout, seconds / 3600, schedule.total_tokens / seconds, peak)

    def _peak(
        self, layout: LayoutConfig, placement: Placement, schedule: Schedule, static: list[int]
    ) -> tuple[int, int]:
        """Bytes on the fullest pipeline rank over all stages of the schedule, and that rank."""
        shapes = {
            (
                *(stage.rows_per_token, stage.sequence_length, stage.global_batch),
                stage.objective,
                stage.micro_batch,
                keeps_blocks_whole(stage, layout.cp),
            ): stage
            for stage in schedule.stages
        }
        peaks = []
        for stage in shapes.values():
            for kind in placement.kinds:
                kept, _, transient = self.planner.peak(layout, placement, stage, kind.rank)
                peaks.append((static[kind.rank] + kept + transient, kind.rank))
        return max(peaks)

    def _too_large(self, layout: LayoutConfig, rank: int, needed: int, state: str) -> None:
        usable = self.planner.usable_bytes / GB
        example = f"{describe(layout)}: pipeline stage {rank} needs {needed / GB:.1f} GB of {usable:.1f}"
        self.result.reject(f"does not fit into memory {state}", example, needed)


def balanced_stages(layers: int, pp: int, vpp: int, head_in_layers: float) -> list[int]:
    """Layers of each of the pp*vpp stages such that pipeline ranks work about equally long.

    The head counts as `head_in_layers` layers. Every stage but the last has at least one; each further layer
    goes to the rank with the least work, of equal ones to the last, which keeps the fewest micro-batches.
    """
    counts = [1] * (pp * vpp - 1) + [0]
    work = [float(sum(counts[rank::pp])) for rank in range(pp)]
    work[-1] += head_in_layers
    for _ in range(layers - sum(counts)):
        rank = min(range(pp), key=lambda rank: (work[rank], -rank))
        stage = min(range(rank, pp * vpp, pp), key=lambda stage: counts[stage])
        counts[stage] += 1
        work[rank] += 1
    return counts


def in_runs(numbers: Iterable[int]) -> str:
    """Numbers in their order, equal neighbours as `TIMESxNUMBER`."""
    runs = [(number, len(list(run))) for number, run in itertools.groupby(numbers)]
    return " ".join(f"{times}x{number}" if times > 1 else str(number) for number, times in runs)


def describe(layout: LayoutConfig) -> str:
    """A layout in one line, without what is 1 or off."""
    axes = [f"{axis} {getattr(layout, axis)}" for axis in ("tp", "pp", "vpp", "cp", "ep", "etp")]
    words = [axis for axis in axes if not axis.endswith(" 1")] or ["data parallel alone"]
    words.append(f"micro-batch {layout.micro_batch}")
    if layout.pipeline:
        words.append(f"stages {in_runs(layout.pipeline)}")
    if layout.recompute is Recompute.selective:
        words.append(f"recompute {' '.join(layout.recompute_modules)}")
    elif layout.recompute is Recompute.full:
        words.append("full recompute")
    return ", ".join(words)


def _with_axis(layout: LayoutConfig, axis: str, way: int) -> LayoutConfig:
    value: dict[str, Any] = {axis: way}
    return replace(layout, **value)


def _recomputing(layout: LayoutConfig, choice: RecomputeChoice) -> LayoutConfig:
    recompute, modules = choice
    return replace(layout, recompute=recompute, recompute_modules=list(modules) or layout.recompute_modules)


def _reason(refusal: BadInput) -> str:
    """A refusal without its numbers, so that alike ones are counted together."""
    sentence = str(refusal).split(": ")[0]
    return re.sub(r"=(\[.*?\]|[\w.]+)", "", re.sub(r"\bhas \d+", "has another number", sentence))


def _divisors(number: int) -> list[int]:
    return [way for way in range(1, number + 1) if number % way == 0]
