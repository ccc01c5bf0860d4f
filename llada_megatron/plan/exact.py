"""The dry run of a layout, started as a child process, beside what the closed form says.

Nothing here imports torch: the child is `python -m llada_megatron.dryrun.rank`, which builds the real model
of chosen ranks and runs training's own step with tensors that hold no values.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from llada_megatron.config.choices import Dispatcher, Fp8, GroupRates, LayerSpec, Recompute
from llada_megatron.config.contents import Parameters
from llada_megatron.config.errors import BadInput
from llada_megatron.config.layout import coordinates, data_parallel_size, micro_batches_per_step, rank_at
from llada_megatron.config.layout_rules import NEED_TRANSFORMER_ENGINE
from llada_megatron.config.parameters import total_parameters
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import Config, LayoutConfig
from llada_megatron.plan.levers import value_of, with_settings
from llada_megatron.plan.planner import Placement, Planner

GROUPS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp*cp",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp*dp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "default_pg": "pp",  # with two stages megatron-core sends one way through the group of all
    "EMBEDDING_GROUP": "embedding",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "etp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "ep*etp",
    "EXPERT_DATA_PARALLEL_GROUP": "expert dp",
}
SCALAR_BYTES = 16
PER_MICRO_BATCH = ("forward", "backward", "step")
"""Phases whose messages every micro-batch sends; in `step` those between pipeline stages."""

Traffic = Counter[tuple[str, str]]
"""Bytes of a step by group and operation."""


@dataclass
class RankComparison:
    """One rank, dry-run and computed; bytes."""

    report: dict[str, Any]
    """What the dry run found; see dryrun/rank.py, RankReport."""
    parameters: Parameters
    static: dict[str, int]
    kept: list[int]
    peak: int
    messages: Traffic
    messages_found: Traffic

    @property
    def rank(self) -> int:
        return int(self.report["pp"])

    @property
    def parameters_found(self) -> int:
        """Elements with a gradient."""
        return sum(size for kind, size in self.report["parameters"].items() if kind != "bias")

    @property
    def static_found(self) -> int:
        return sum(size for part, size in self.report["static"].items() if part != "other")


REPLACED: dict[str, Any] = {
    "layout.dispatcher": Dispatcher.alltoall,
    "layout.delay_weight_gradients": False,
    "layout.overlap_tensor_parallel": False,
    "layout.offload_modules": [],
    "precision.fp8": Fp8.none,
    "training.cuda_graphs": [],
}
"""Switches of TransformerEngine, DeepEP and CUDA streams, of which a dry run has none: it runs without."""


def replaced(config: Config) -> list[str]:
    """The run's switches that the dry run leaves out."""
    kept = {"layout.dispatcher": [Dispatcher.allgather]}
    return [
        name for name, off in REPLACED.items() if value_of(config, name) not in (off, *kept.get(name, []))
    ]


def check(config: Config) -> None:
    """Raise BadInput for settings that the dry run cannot follow."""
    needs = set(config.layout.recompute_modules) & NEED_TRANSFORMER_ENGINE.keys()
    if config.layout.recompute is Recompute.selective and needs:
        raise BadInput(
            f"--exact runs the local layers, which cannot compute {', '.join(sorted(needs))} again: leave"
            " them out of layout.recompute_modules."
        )


def dry_configuration(config: Config) -> Config:
    """The run as the dry run has it: half of the positions masked, local layers, switches left out."""
    groups = replace(config.diffusion.multi_block, rates=GroupRates.independent)
    editing = replace(config.diffusion.editing, replaced=0.0)
    config = with_settings(config, {name: REPLACED[name] for name in replaced(config)})
    return replace(
        config,
        diffusion=replace(
            config.diffusion, mask_rate_min=0.25, mask_rate_max=0.75, multi_block=groups, editing=editing
        ),
        schedule=replace(
            config.schedule,
            stages=[replace(each, mask_rate_min=0, mask_rate_max=0) for each in config.schedule.stages],
        ),
        model=replace(config.model, layer_spec=LayerSpec.local),
    )


def dry_micro_batches(config: Config, stage: Stage) -> int:
    """So many that a pipeline is full and in its rhythm; every further one repeats what was seen."""
    layout = config.layout
    enough = layout.pp + 1 if layout.pp > 1 else 1 + layout.overlap_experts
    if layout.vpp > 1:
        ahead = 2 * (layout.pp - 1) + (layout.vpp - 1) * layout.pp + layout.overlap_experts
        rounds = -(-(ahead + 1) // (layout.vpp * layout.pp))
        enough = rounds * layout.pp
    real, passes_before = micro_batches_per_step(layout, stage), stage.geometry.passes_before
    if passes_before(config, enough) < passes_before(config, real):
        enough = 2
    return min(enough, real)


def chosen_ranks(text: str, layout: LayoutConfig) -> list[int]:
    """Ranks from `R,R`; raises BadInput for what is no rank of the layout."""
    words = text.split(",")
    ranks = [int(word) for word in words if word.isdecimal() and int(word) < layout.processes]
    if len(ranks) < len(words):
        raise BadInput(f"--ranks {text}: give ranks from 0 to {layout.processes - 1}, such as --ranks 0,1.")
    return ranks


def one_rank_per_stage(layout: LayoutConfig) -> list[int]:
    """The first rank of each pipeline stage."""
    return [rank_at(layout, tp=0, cp=0, dp=0, pp=pp) for pp in range(layout.pp)]


def one_rank_per_shard(layout: LayoutConfig) -> list[int]:
    """The first rank of each place in the grids that holds other parameters than its neighbours."""
    first: dict[tuple[int, ...], int] = {}
    for rank in range(layout.processes):
        at = coordinates(layout, rank)
        first.setdefault((at.pp, at.tp, at.ep, at.etp), rank)
    return sorted(first.values())


def compare(
    planner: Planner, placement: Placement, stage: Stage, report: dict[str, Any], micro_batches: int
) -> RankComparison:
    """A rank's report beside the closed form of the same balanced step with as many micro-batches."""
    layout, rank = planner.config.layout, int(report["pp"])
    samples = micro_batches * stage.micro_batch * data_parallel_size(layout)
    dry_stage = replace(stage, global_batch=samples)
    shape, units = planner.sizes(layout, stage)
    stages = placement.contents[rank]
    kept = [units.kept(contents) + units.held(contents) for contents in stages]
    real, passes_before = micro_batches_per_step(layout, stage), stage.geometry.passes_before
    if not passes_before(
        planner.config, micro_batches
    ):  # which has it already when the step's own forward begins
        kept[0] += units.gathering
    at_peak, _, transient = planner.peak(layout, placement, dry_stage, rank)
    computed = planner.formulas.of_rank(
        planner.model,
        shape,
        layout,
        placement.held[rank],
        stages,
        real,
        b=planner.b,
        gradient_bytes=planner.kept.gradient,
        passes_before=passes_before(planner.config, real),
    )
    messages: Traffic = Counter()
    for calls, message in computed:
        if placement.links[message.group].ranks > 1 and message.payload > SCALAR_BYTES:
            messages[message.group, message.operation] += int(calls * message.payload)
    static = placement.static[rank]
    return RankComparison(
        report=report,
        parameters=placement.held[rank],
        static=static,
        kept=kept,
        peak=sum(static.values()) + at_peak + transient,
        messages=+messages,
        messages_found=_messages_found(report, real, micro_batches),
    )


def _messages_found(report: dict[str, Any], real: int, dry: int) -> Traffic:
    """Of a step with `real` micro-batches, without scalars, metrics, a loss's sums and what is received."""
    found: Traffic = Counter()
    for message in report["messages"]:
        between_stages = message["operation"] == "send"
        aside = message["phase"] == "loss" or (message["phase"] == "step" and not between_stages)
        if message["operation"] == "recv" or aside:
            continue
        if message["bytes"] > SCALAR_BYTES * message["calls"]:
            group = GROUPS.get(message["group"], message["group"])
            size = message["bytes"]
            if message["phase"] in PER_MICRO_BATCH:
                size = size * real // dry  # micro-batches are alike
            found[group, message["operation"]] += size
    return found


def counted_parameters(config: Config, reports: list[dict[str, Any]]) -> tuple[int, int]:
    """Parameters over all places of the grids, each shard once, and what they should be; with expert_bias."""
    shards: dict[tuple[Any, ...], int] = {}
    for report in reports:
        at, found = coordinates(config.layout, report["rank"]), report["parameters"]
        for place, kind in (
            (("sharded", at.pp, at.tp), "sharded"),
            (("replicated", at.pp), "replicated"),
            (("expert", at.pp, at.ep, at.etp), "expert"),
            (("bias", at.pp), "bias"),
        ):
            if shards.setdefault(place, found[kind]) != found[kind]:
                raise RuntimeError(f"rank {report['rank']} holds other {kind} parameters than its replicas")
    return sum(shards.values()), total_parameters(config.model)
