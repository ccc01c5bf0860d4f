"""One layout: memory of every pipeline rank, time and traffic of every stage of the schedule."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass

from llada_megatron.config.contents import Parameters
from llada_megatron.config.families import formulas_of
from llada_megatron.config.flops import (
    DocumentLengths,
    mfu,
    model_flops_per_token,
    pairs_per_sequence,
    read_before_per_sequence,
    supervised_per_sequence,
    training_flops_per_sequence,
)
from llada_megatron.config.last_layer import last_rows_per_token
from llada_megatron.config.layout import micro_batches_per_step
from llada_megatron.config.parameters import cached_token_bytes
from llada_megatron.config.schedule import Schedule, Stage
from llada_megatron.config.schema import Config, LayoutConfig
from llada_megatron.plan.activations import recomputed_modules
from llada_megatron.plan.checkpoints import Checkpoints, checkpoints_of
from llada_megatron.plan.decoding import Decoding, decoding_of
from llada_megatron.plan.layer_time import EXCHANGE
from llada_megatron.plan.levers import Effect, effects
from llada_megatron.plan.planner import Placement, Planner, Step
from llada_megatron.plan.timing import paired_share
from llada_megatron.plan.topology import gpus


@dataclass(frozen=True)
class RankMemory:
    """Bytes at the peak on the fullest process of a pipeline rank."""

    rank: int
    layers: list[int]
    """Of each virtual stage."""
    parameters: Parameters
    parts: dict[str, int]
    """weights, gradients, optimizer, activations, transient."""
    activations: dict[str, int]
    """`activations` by part of the model."""
    in_flight: tuple[int, ...]
    """Micro-batches of each virtual stage that wait for their backward at the peak."""
    stage: str
    """The stage of the schedule that needs the most."""

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class GroupTraffic:
    """What a process sends in one group during a step, on the pipeline rank that sends most."""

    group: str
    ranks: int
    on_node: int
    payload: float
    """Bytes."""
    seconds: float
    """As if nothing hid it."""


@dataclass(frozen=True)
class StageTime:
    """Time of one stage of the schedule."""

    name: str
    block_size: int
    sequence_length: int
    rows: int
    """Rows of a sequence: 2L with a clean copy, else L."""
    steps: int
    tokens: int
    micro_batches: int
    passes_before: int
    """Forward passes over the batch before a step's own."""
    fewest_passes_before: int
    """The same with one micro-batch per rank."""
    paired_share: float
    """Of the slowest rank's micro-batches, whose forward runs beside another one's backward."""
    step_seconds: float
    seconds: dict[str, float]
    """Of a step, by kind, on the slowest pipeline rank; `bubble` is its waiting, `before` comes first."""
    model_flops_per_token: float
    performed_flops_per_token: float
    """With what recompute repeats and passes before the step's own."""
    tokens_per_sec: float
    mfu: float
    hours: float
    gpu_hours: float
    traffic: list[GroupTraffic]


@dataclass(frozen=True)
class Plan:
    """What a run needs under its layout."""

    name: str
    cluster: str
    gpus: int
    layout: LayoutConfig
    usable_bytes: int
    memory_bytes: int
    expert_imbalance: float
    largest_imbalance: float | None
    """With which it still fits, rounded down to tenths; None where it cannot matter, or nothing fits."""
    documents: DocumentLengths | None
    """Of packed sequences; None: each is one document."""
    ranks: list[RankMemory]
    stages: list[StageTime]
    price_per_gpu_hour: float
    decoding: Decoding | None
    """None where the last stage of the schedule trains no model that fills masks."""
    checkpoints: Checkpoints
    effects: list[Effect]
    """Of each switch, turned alone, in the longest stage of the schedule."""

    @property
    def fullest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def fits(self) -> bool:
        return self.fullest.peak <= self.usable_bytes

    @property
    def hours(self) -> float:
        return sum(stage.hours for stage in self.stages)

    @property
    def tokens_per_sec(self) -> float:
        """Over the whole schedule."""
        return sum(stage.tokens for stage in self.stages) / self.hours / 3600

    @property
    def mfu(self) -> float:
        """Over the whole schedule."""
        return sum(stage.mfu * stage.hours for stage in self.stages) / self.hours

    @property
    def cost(self) -> float | None:
        """In the currency of cluster.price_per_gpu_hour; None where that is not known."""
        return self.price_per_gpu_hour * self.hours * self.gpus or None


def plan(planner: Planner, layout: LayoutConfig, schedule: Schedule) -> Plan:
    """Everything about one layout, which rules.check must have accepted."""
    placement, cluster = planner.place(layout), planner.cluster
    stages = [_stage_time(planner, layout, placement, stage) for stage in schedule.stages]
    longest = max(stages, key=lambda stage: stage.hours)
    return Plan(
        name=planner.config.run.name,
        cluster=cluster.name,
        gpus=gpus(cluster),
        layout=layout,
        usable_bytes=planner.usable_bytes,
        memory_bytes=planner.memory_bytes,
        expert_imbalance=planner.expert_imbalance,
        largest_imbalance=largest_imbalance(planner, layout, schedule),
        documents=planner.documents,
        ranks=[_rank_memory(planner, layout, placement, schedule, rank) for rank in range(layout.pp)],
        stages=stages,
        price_per_gpu_hour=cluster.price_per_gpu_hour,
        decoding=decoding_of(
            schedule.stages,
            cached_token_bytes(planner.model, planner.config.precision, layout),
            context=schedule.stages[-1].sequence_length,
        ),
        checkpoints=checkpoints_of(planner.config, layout, placement.held, b=planner.b),
        effects=effects(planner, schedule, schedule.stages[stages.index(longest)]),
    )


def largest_imbalance(planner: Planner, layout: LayoutConfig, schedule: Schedule) -> float | None:
    """The largest expert_imbalance, in tenths, that fits: at ep the experts of one process get all rows."""
    if not planner.model.has_experts or layout.ep == 1:
        return None

    def fits(tenths: int) -> bool:
        other = Planner(planner.config, expert_imbalance=tenths / 10, documents=planner.documents)
        placement = other.place(layout)
        peaks = (_rank_memory(other, layout, placement, schedule, rank).peak for rank in range(layout.pp))
        return all(peak <= planner.usable_bytes for peak in peaks)

    tenths = range(10, 10 * layout.ep + 1)
    return (
        tenths[found - 1] / 10 if (found := bisect_left(tenths, True, key=lambda at: not fits(at))) else None
    )


def _rank_memory(
    planner: Planner, layout: LayoutConfig, placement: Placement, schedule: Schedule, rank: int
) -> RankMemory:
    def needed(stage: Stage) -> int:
        kept, _, transient = planner.peak(layout, placement, stage, rank)
        return kept + transient

    stage = max(schedule.stages, key=needed)
    kept, in_flight, transient = planner.peak(layout, placement, stage, rank)
    return RankMemory(
        rank=rank,
        layers=[contents.layers for contents in placement.contents[rank]],
        parameters=placement.held[rank],
        parts={**placement.static[rank], "activations": kept, "transient": transient},
        activations=_activations(planner, layout, placement, stage, rank, in_flight),
        in_flight=in_flight,
        stage=stage.name,
    )


def _activations(
    planner: Planner,
    layout: LayoutConfig,
    placement: Placement,
    stage: Stage,
    rank: int,
    in_flight: tuple[int, ...],
) -> dict[str, int]:
    """What micro-batches in flight keep, by part of the model."""
    _, units = planner.sizes(layout, stage)
    parts: Counter[str] = Counter(stage=units.gathering)
    for contents, count in zip(placement.contents[rank], in_flight, strict=True):
        for number, unit in units.of(contents):
            for name, size in unit.parts.items():
                parts[name] += count * number * size
        parts["stage"] += units.held(contents)
    return {name: size for name, size in parts.items() if size}


def _stage_time(planner: Planner, layout: LayoutConfig, placement: Placement, stage: Stage) -> StageTime:
    config, step = planner.config, planner.step(layout, placement, stage)
    devices = gpus(planner.cluster)
    tokens_per_sec = stage.tokens / stage.steps / step.total
    needed, performed = flops_per_token(config, layout, stage, planner.documents)
    hours = stage.steps * step.total / 3600
    return StageTime(
        name=stage.name,
        block_size=stage.block_size,
        sequence_length=stage.sequence_length,
        rows=stage.sequence_length * stage.rows_per_token,
        steps=stage.steps,
        tokens=stage.tokens,
        micro_batches=micro_batches_per_step(layout, stage),
        passes_before=passes_before(config, layout, stage),
        fewest_passes_before=stage.geometry.passes_before(config, 1),
        paired_share=paired_share(layout, step.slowest.last, micro_batches_per_step(layout, stage)),
        step_seconds=step.total,
        seconds=_breakdown(planner, layout, placement, stage, step),
        model_flops_per_token=needed,
        performed_flops_per_token=performed,
        tokens_per_sec=tokens_per_sec,
        mfu=mfu(config, stage, tokens_per_sec, devices=devices, documents=planner.documents),
        hours=hours,
        gpu_hours=hours * devices,
        traffic=_traffic(planner, layout, placement, stage),
    )


def passes_before(config: Config, layout: LayoutConfig, stage: Stage) -> int:
    """Forward passes over a step's batch before its own."""
    return stage.geometry.passes_before(config, micro_batches_per_step(layout, stage))


def flops_per_token(
    config: Config, layout: LayoutConfig, stage: Stage, documents: DocumentLengths | None = None
) -> tuple[float, float]:
    """Model FLOPs of training per data token, and those performed with what recompute repeats.

    Attention counts visible pairs; recompute repeats the forward pass of its modules, and the head's where
    supervised rows fill more than one chunk. A pass before the step's own is performed, and not needed: what
    it tells could be had with one micro-batch per rank.
    """
    model, length = config.model, stage.sequence_length
    positions = length * stage.rows_per_token
    last_positions = length * last_rows_per_token(config, layout, stage)
    pairs = pairs_per_sequence(config, stage, documents)
    supervised = supervised_per_sequence(config, stage)
    chunked = supervised * stage.micro_batch / layout.cp > model.head_chunk_tokens
    performed = training_flops_per_sequence(
        model,
        positions=positions,
        pairs=pairs,
        supervised=supervised,
        head_recomputed=chunked,
        last_positions=last_positions,
    )
    formulas, again = formulas_of(model), recomputed_modules(layout)
    weights, last_weights = formulas.active_weights(model), formulas.last_layer_weights(model)
    ended = {module: (positions - last_positions) * size for module, size in last_weights.items()}
    performed += 2 * sum(
        positions * size - ended.get(module, 0) for module, size in weights.items() if module in again
    )
    if "core_attn" in again:
        performed += formulas.pair_flops(model) * pairs
    before = training_flops_per_sequence(
        model,
        positions=positions,
        pairs=pairs,
        supervised=read_before_per_sequence(config, stage),
        head_recomputed=False,
        last_positions=last_positions,
        before=True,
    )
    performed += passes_before(config, layout, stage) * before / 3  # forward is a third of both
    return model_flops_per_token(config, stage, documents), performed / length


def _breakdown(
    planner: Planner, layout: LayoutConfig, placement: Placement, stage: Stage, step: Step
) -> dict[str, float]:
    """Seconds of a step by kind, on the slowest pipeline rank; what the other ranks do is in the bubble."""
    blocks, kind = planner.blocks(layout, stage, placement.links), step.slowest
    parts = blocks.seconds.of(kind.counts)
    parts["memory"] += kind.accumulation
    parts["pp"] += kind.ends * planner.neighbour_seconds(placement, blocks)
    micro_batches = micro_batches_per_step(layout, stage)
    seconds = {name: micro_batches * part for name, part in parts.items() if part}
    spared = step.paired
    for name in (*EXCHANGE, "launches"):
        hidden = min(spared, seconds.get(name, 0.0))
        spared -= hidden
        if hidden:
            seconds[name] -= hidden
    if step.before:
        seconds["before"] = step.before
    return seconds | {"gradients": step.gradients, "optimizer": step.optimizer, "bubble": step.bubble}


def _traffic(
    planner: Planner, layout: LayoutConfig, placement: Placement, stage: Stage
) -> list[GroupTraffic]:
    """Bytes and seconds of a step in each group, on the pipeline rank where that group takes longest."""
    links, (shape, _) = placement.links, planner.sizes(layout, stage)
    micro_batches = micro_batches_per_step(layout, stage)
    found: dict[str, GroupTraffic] = {}
    for kind in placement.kinds:
        stages = placement.contents[kind.rank]
        held = placement.held[kind.rank]
        payload: dict[str, float] = defaultdict(float)
        seconds: dict[str, float] = defaultdict(float)
        sent = planner.formulas.of_rank(
            planner.model,
            shape,
            layout,
            held,
            stages,
            micro_batches,
            b=planner.b,
            gradient_bytes=planner.kept.gradient,
            passes_before=passes_before(planner.config, layout, stage),
        )
        for calls, message in sent:
            payload[message.group] += calls * message.payload
            seconds[message.group] += calls * message.seconds(links)
        for name, total in payload.items():
            if total and links[name].ranks > 1 and (name not in found or seconds[name] > found[name].seconds):
                group = links[name]
                found[name] = GroupTraffic(name, group.ranks, group.on_node, total, seconds[name])
    return list(found.values())
