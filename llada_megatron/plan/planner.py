"""What search and plan share: the costs of a layout, with what layouts have in common worked out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llada_megatron.config.choices import Fp8
from llada_megatron.config.contents import Contents, Parameters
from llada_megatron.config.errors import BadInput
from llada_megatron.config.families import formulas_of
from llada_megatron.config.flops import DocumentLengths
from llada_megatron.config.layout import micro_batches_per_step
from llada_megatron.config.quantities import GB
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import Config, LayoutConfig
from llada_megatron.plan import memory, timing, traffic, transient
from llada_megatron.plan.families import plan_formulas_of
from llada_megatron.plan.peak import peak_activations
from llada_megatron.plan.rates import rates
from llada_megatron.plan.shapes import BYTES, Shape, shape_of
from llada_megatron.plan.topology import Group, check_cluster, groups

EXPERT_IMBALANCE = 1.2
"""Tokens at the busiest process's experts over the mean, unless the user says otherwise."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Seconds of every building block, for one layout and one stage of the schedule."""

    shape: Shape
    seconds: timing.Seconds
    totals: tuple[float, float, float, float]
    """Seconds of a dense layer, a MoE layer, the embedding and the head."""
    before: tuple[float, float, float, float]
    """The same of a pass without gradients; zeros where the objective asks for none."""
    paired: float
    """What a MoE layer spares where a forward and a backward run together (layout.overlap_experts)."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What lies where under a layout, whatever the micro-batch and the recompute."""

    contents: list[list[Contents]]
    held: list[Parameters]
    static: list[memory.Static]
    links: dict[str, Group]
    kinds: list[Kind]
    optimizer: float
    """Seconds per step on the slowest rank."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Pipeline ranks that hold the same."""

    rank: int
    """The first of them, which has the most micro-batches in flight."""
    last: int
    """The last of them, which waits most and runs the fewest micro-batches ahead."""
    alike: int
    counts: tuple[int, int, int, int]
    """Dense layers, MoE layers, embeddings and heads."""
    ends: float
    """Neighbours that it exchanges hidden states with, by the share of it that nothing hides."""
    accumulation: float
    """Seconds per micro-batch."""
    messages: list[traffic.Message]
    """Of gradients and weights, once per step."""
    message_seconds: dict[str, float]
    """By what may hide them; see timing.gradient_seconds."""


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of one step."""

    before: float
    """Forward passes over the batch before the step's own, with their bubble."""
    work: float
    """All micro-batches on the slowest pipeline rank, less `paired`."""
    paired: float
    """What it spares where two micro-batches run together."""
    bubble: float
    gradients: float
    optimizer: float
    slowest: Kind
    """That rank and those like it."""

    @property
    def total(self) -> float:
        return self.before + self.work + self.bubble + self.gradients + self.optimizer


class Planner:
    """Plans layouts of one configuration; what layouts have in common is worked out once."""

    def __init__(
        self,
        config: Config,
        *,
        expert_imbalance: float = EXPERT_IMBALANCE,
        documents: DocumentLengths | None = None,
    ) -> None:
        """documents: of packed sequences; without them each is one document.

        Raises BadInput for a cluster that lacks what a plan needs, and a model family without formulas.
        """
        check_cluster(config)
        if not 1 <= expert_imbalance < float("inf"):
            raise BadInput(
                f"--expert-imbalance {expert_imbalance:g} is a maximum over a mean: give at least 1."
            )
        self.config, self.model, self.cluster = config, config.model, config.cluster
        self.formulas = plan_formulas_of(config.model)
        self.expert_imbalance, self.documents = expert_imbalance, documents
        self.b = BYTES[config.precision.dtype]
        self.rates = rates(config)
        self.kept = memory.Kept(
            self.b,
            self.rates.gradient_bytes,
            self.rates.moment_bytes,
            averages=config.training.ema_decay > 0,
            fp8=config.precision.fp8 is not Fp8.none,
        )
        self.memory_bytes = int(self.cluster.memory_gb * GB)
        self.usable_bytes = int(self.memory_bytes * (1 - self.cluster.memory_margin))
        self._sizes: dict[tuple[object, ...], tuple[Shape, memory.Units]] = {}
        self._blocks: dict[tuple[object, ...], Blocks] = {}

    def place(self, layout: LayoutConfig) -> Placement:
        """What every pipeline rank holds and which groups its messages use."""
        formulas = formulas_of(self.model)
        contents = formulas.stage_contents(self.model, layout)
        held = [
            formulas.parameters(self.model, stages, tp=layout.tp, ep=layout.ep, etp=layout.etp)
            for stages in contents
        ]
        links = groups(layout, self.cluster)
        alike: dict[tuple[Contents, ...], list[int]] = {}
        for rank, stages in enumerate(contents):
            alike.setdefault(tuple(stages), []).append(rank)
        table = self.model.vocab_size // layout.tp * self.model.hidden_size
        tables = [sum(stage.first + stage.last for stage in stages) * table for stages in contents]
        return Placement(
            contents=contents,
            held=held,
            static=[
                memory.static_bytes(one, layout, self.kept, tables=size)
                for one, size in zip(held, tables, strict=True)
            ],
            links=links,
            kinds=[
                self._kind(layout, stages, ranks, held[ranks[0]], links) for stages, ranks in alike.items()
            ],
            optimizer=max(timing.optimizer_seconds(one, layout, self.rates) for one in held),
        )

    def _kind(
        self,
        layout: LayoutConfig,
        stages: Sequence[Contents],
        ranks: list[int],
        held: Parameters,
        links: dict[str, Group],
    ) -> Kind:
        ends = (ranks[0] > 0) + (ranks[0] < layout.pp - 1)
        messages = traffic.step_messages(
            held,
            self.model,
            layout,
            b=self.b,
            holds_table=stages[0].first or stages[-1].last,
            gradient_bytes=self.kept.gradient,
        )
        return Kind(
            rank=ranks[0],
            last=ranks[-1],
            alike=len(ranks),
            counts=timing.counts(stages),
            ends=ends * (1.0 if layout.vpp == 1 else 1 - self.rates.overlap),
            accumulation=timing.accumulation_seconds(held, self.rates),
            messages=messages,
            message_seconds=timing.message_seconds(messages, links),
        )

    def sizes(self, layout: LayoutConfig, stage: Stage) -> tuple[Shape, memory.Units]:
        """Shape and bytes of building blocks; what they do not depend on (pp, dp), layouts share."""
        key = self._key(layout, stage)
        if key not in self._sizes:
            shape = shape_of(
                self.config,
                layout,
                stage,
                expert_imbalance=self.expert_imbalance,
                documents=self.documents,
            )
            self._sizes[key] = shape, self.formulas.units(self.model, shape, layout, b=self.b)
        return self._sizes[key]

    def blocks(self, layout: LayoutConfig, stage: Stage, links: dict[str, Group]) -> Blocks:
        """Building blocks with their seconds, shared likewise."""
        key = self._key(layout, stage)
        if key not in self._blocks:
            shape, units = self.sizes(layout, stage)
            given = layout, self.rates, links, units
            seconds, before = self.formulas.seconds_of(self.model, shape, *given), (0.0, 0.0, 0.0, 0.0)
            if stage.geometry.passes_before(self.config, micro_batches_per_step(layout, stage)):
                once = self.formulas.seconds_of(self.model, shape.before, *given, forward_only=True)
                before = once.totals
            self._blocks[key] = Blocks(shape, seconds, seconds.totals, before, seconds.moe.paired)
        return self._blocks[key]

    def _key(self, layout: LayoutConfig, stage: Stage) -> tuple[object, ...]:
        return (
            *(layout.tp, layout.cp, layout.ep, layout.etp, layout.recompute, *layout.recompute_modules),
            *(layout.dispatcher, layout.overlap_experts, layout.delay_weight_gradients),
            *(layout.overlap_shared_experts, layout.overlap_tensor_parallel, *layout.offload_modules),
            *(stage.index, stage.micro_batch),
            stage.geometry.passes_before(self.config, micro_batches_per_step(layout, stage)),
        )

    def peak(
        self, layout: LayoutConfig, placement: Placement, stage: Stage, rank: int
    ) -> tuple[int, tuple[int, ...], int]:
        """Bytes that a rank keeps at its peak, the micro-batches in flight then, and transient bytes."""
        _, units = self.sizes(layout, stage)
        stages = placement.contents[rank]
        micro_batches = micro_batches_per_step(layout, stage)
        kept, counts, moment = peak_activations(units, stages, layout, rank, micro_batches)
        neighbours = transient.pipeline_buffers(layout, rank) * units.hidden
        afterwards = units.clipping - kept if stages[0].first else 0
        return kept, counts, max(moment + neighbours, afterwards)

    def step(self, layout: LayoutConfig, placement: Placement, stage: Stage) -> Step:
        """Seconds of a step in a stage of the schedule."""
        blocks = self.blocks(layout, stage, placement.links)
        neighbour = self.neighbour_seconds(placement, blocks)
        micro_batches = micro_batches_per_step(layout, stage)
        alike = [kind.alike for kind in placement.kinds]
        per_kind = [
            _through(kind, blocks.totals) + kind.accumulation + kind.ends * neighbour
            for kind in placement.kinds
        ]
        work, bubble = timing.pipeline_seconds(per_kind, alike, micro_batches, layout.vpp)
        before, passes_before = 0.0, stage.geometry.passes_before(self.config, micro_batches)
        if passes_before:
            forward = [_through(kind, blocks.before) + kind.ends * neighbour / 2 for kind in placement.kinds]
            once = timing.pipeline_seconds(forward, alike, micro_batches, layout.vpp)
            before = passes_before * sum(once)
        gradients = 0.0
        for kind, seconds in zip(placement.kinds, per_kind, strict=True):
            gradients = max(
                gradients, timing.gradient_seconds(kind.message_seconds, layout, seconds, self.rates.overlap)
            )
        slowest = placement.kinds[per_kind.index(max(per_kind))]
        together = timing.paired_share(layout, slowest.last, micro_batches) * micro_batches
        paired = together * slowest.counts[1] * blocks.paired
        return Step(before, work - paired, paired, bubble, gradients, placement.optimizer, slowest)

    def neighbour_seconds(self, placement: Placement, blocks: Blocks) -> float:
        """Of one micro-batch: hidden states to or from a neighbouring stage, and their gradients."""
        message = traffic.boundary_message(self.model, blocks.shape, b=self.b)
        return 2 * placement.links["pp"].seconds(message.operation, message.payload)


def _through(kind: Kind, seconds: tuple[float, float, float, float]) -> float:
    """Of one micro-batch through what a rank holds."""
    dense, moe, embedding, head = seconds
    layers = kind.counts[0] * dense + kind.counts[1] * moe
    return layers + (kind.counts[2] * embedding + kind.counts[3] * head)
