"""How fast a forward of decoding should be, by tensor parallelism, branch parallelism and batch.

A forward within a block: every sequence is as long as the context, and every row of its active blocks is
still masked. So the head reads all rows, and attention sees all keys.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from llada_megatron.config.errors import BadInput
from llada_megatron.config.families import formulas_of
from llada_megatron.config.layout import data_parallel_size, smallest_world
from llada_megatron.config.layout_rules import check_layout
from llada_megatron.config.objectives import RowBytes
from llada_megatron.config.parameters import cached_token_bytes
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import Config, Dispatcher, LayoutConfig, Recompute
from llada_megatron.plan.decoding import cache_bytes
from llada_megatron.plan.decoding_work import Active, Work
from llada_megatron.plan.memory import Kept, static_bytes
from llada_megatron.plan.planner import Planner
from llada_megatron.plan.shapes import Shape
from llada_megatron.plan.topology import gpus, groups
from llada_megatron.plan.traffic import Message

WAYS = (1, 2, 4, 8)
"""Of tensor parallelism, where none are given."""
BATCHES = (1, 8, 32)
FIGURES = 2
"""Numbers that a rule such as `threshold` needs of a row, float64: a token and its probability."""
READOUT = RowBytes(sums=(4, 8, 4))
"""Of the readout `proposal`: largest logit, its id, sum of exponentials."""


@dataclass(frozen=True)
class Workload:
    """What is decoded at a time."""

    block_size: int
    context: int
    """Tokens of each sequence."""
    branches: int = 0
    """Lookahead branches beside the anchor."""
    buffer: int = 1
    """Active blocks of a sequence."""
    tokens_per_forward: float = 1.0
    """That a sequence gains by a forward: assumed."""


@dataclass(frozen=True)
class Forward:
    """One forward of a layout, as its ranks see it."""

    tp: int
    bp: int
    batch: int
    """Sequences of a replica, or of the bp replicas that share them."""
    processes: int
    """Of the smallest job with these axes, of which the cluster holds `jobs`."""
    jobs: int
    rows: int
    """On each rank, before sequence parallelism splits them."""
    weight_bytes: int
    """Held on each rank."""
    cache_bytes: int
    usable_bytes: int
    work: dict[str, Work]
    seconds: dict[str, float]
    """compute: operations that wait for FLOPs; memory: those that wait for bytes; messages, by group."""
    tokens_per_forward: float

    @property
    def fits(self) -> bool:
        return self.weight_bytes + self.cache_bytes <= self.usable_bytes

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def message_seconds(self) -> float:
        return self.total_seconds - self.seconds["compute"] - self.seconds["memory"]

    @property
    def tokens_per_sec_per_sequence(self) -> float:
        return self.tokens_per_forward / self.total_seconds

    @property
    def tokens_per_sec(self) -> float:
        """Of all sequences on the cluster's devices."""
        sequences = self.batch * self.jobs * self.processes // (self.tp * self.bp)
        return self.tokens_per_sec_per_sequence * sequences


def check_workload(stage: Stage, workload: Workload) -> None:
    """Raise BadInput with one sentence where a decoder has no such forward."""
    block, active = workload.block_size, workload.buffer * workload.block_size
    if stage.geometry.causal:
        raise BadInput(
            f"The last stage of the schedule, {stage.name}, predicts next tokens, and --decode plans forwards"
            " over blocks of masks: give a schedule whose last stage fills them."
        )
    if workload.buffer < 1 or active > workload.context:
        raise BadInput(
            f"--buffer {workload.buffer} of blocks of {block} does not fit into --context"
            f" {workload.context}: give at least 1 block, and room for all of them."
        )
    if not 0 <= workload.branches <= block:
        raise BadInput(
            f"--branches {workload.branches} is out of range: a block has {block} tokens, of which each"
            f" lookahead branch adds one, so give from 0 to {block}."
        )
    if not 0 < workload.tokens_per_forward <= active:
        raise BadInput(
            f"--tokens-per-forward {workload.tokens_per_forward:g} is out of range: a sequence has {active}"
            f" active tokens, so give a number above 0 and up to {active}."
        )


def plan_decoding(
    planner: Planner,
    workload: Workload,
    *,
    batches: Sequence[int] = BATCHES,
    tps: Sequence[int] = (),
    bps: Sequence[int] = (),
) -> list[Forward]:
    """Forwards of every layout and batch, `check_workload` having accepted them.

    tps, bps: layout.tp and layout.bp; without them those of WAYS and the divisors of branches + 1 that model
    and cluster allow. Raises BadInput for a given one that they do not, and where none is left.
    """
    versions = workload.branches + 1
    divisors = [bp for bp in range(1, versions + 1) if versions % bp == 0]
    layouts: list[LayoutConfig] = []
    refused: dict[tuple[int, int], BadInput] = {}
    for tp, bp in product(tps or WAYS, bps or divisors):
        try:
            layouts.append(decoding_layout(planner.config, workload, tp, bp))
        except BadInput as error:
            refused[tp, bp] = error
    out = set(tps) - {layout.tp for layout in layouts}, set(bps) - {layout.bp for layout in layouts}
    for (tp, bp), refusal in refused.items():
        if not layouts or tp in out[0] or bp in out[1]:
            raise refusal
    return [forward_of(planner, layout, workload, batch) for layout in layouts for batch in batches]


def decoding_layout(config: Config, workload: Workload, tp: int, bp: int) -> LayoutConfig:
    """The smallest layout with these axes and the run's ep and etp; BadInput where there is none."""
    cluster, versions = config.cluster, workload.branches + 1
    if tp > cluster.gpus_per_node:
        raise BadInput(
            f"--tp {tp} is out of range: tensor parallelism stays on a node, so give from 1 to"
            f" {cluster.gpus_per_node}."
        )
    if versions % bp:
        raise BadInput(
            f"--bp {bp} does not divide branches + 1 = {versions}, the anchor among them: give --branches"
            f" {-(-versions // bp) * bp - 1}, or another --bp."
        )
    axes = replace(config.layout, tp=tp, bp=bp, pp=1, vpp=1, cp=1, pipeline=[], recompute=Recompute.none)
    layout = replace(axes, processes=smallest_world(axes))
    # On as many devices as the cluster has, a refusal names every tp that would do.
    everywhere = replace(layout, processes=math.lcm(layout.processes, gpus(cluster)))
    check_layout(replace(config, layout=everywhere))
    if layout.processes > gpus(cluster):
        raise BadInput(
            f"layout.ep={layout.ep}, etp={layout.etp}, tp={tp} and bp={bp} need {layout.processes} GPUs, and"
            f" cluster {cluster.name} has {gpus(cluster)}: make one of them smaller."
        )
    return layout


def forward_of(planner: Planner, layout: LayoutConfig, workload: Workload, batch: int) -> Forward:
    """One forward of a decoding_layout."""
    config, model, memory = planner.config, planner.model, planner.rates.memory
    branches = (workload.branches + 1) // layout.bp
    rows = batch * branches * workload.buffer * workload.block_size
    shape = forward_shape(planner, layout, workload, rows)
    active = Active(workload.block_size, batch * branches, workload.context)
    work = planner.formulas.decoding_work(model, shape, layout, active, planner.rates)
    seconds: dict[str, float] = defaultdict(float, compute=0.0, memory=0.0)
    for each in work.values():
        seconds["compute" if each.is_compute_bound(memory) else "memory"] += each.seconds(memory)
    links = groups(layout, planner.cluster)
    messages = [*planner.formulas.decoding_messages(model, shape, layout, b=planner.b)]
    for times, message in [*messages, *_of_decoder(layout, rows)]:
        if took := times * message.seconds(links):
            seconds[message.group] += took
    formulas = formulas_of(model)
    held = formulas.parameters(
        model, *formulas.stage_contents(model, layout), tp=layout.tp, ep=layout.ep, etp=layout.etp
    )
    return Forward(
        tp=layout.tp,
        bp=layout.bp,
        batch=batch,
        processes=layout.processes,
        jobs=gpus(planner.cluster) // layout.processes,
        rows=rows,
        weight_bytes=static_bytes(held, layout, Kept(planner.b))["weights"],
        cache_bytes=cache_bytes(
            cached_token_bytes(model, config.precision, layout),
            workload.block_size,
            context=workload.context,
            batch=batch,
            buffer=workload.buffer,
            branches=branches,
        ),
        usable_bytes=planner.usable_bytes,
        work=work,
        seconds=dict(seconds),
        tokens_per_forward=workload.tokens_per_forward,
    )


def forward_shape(planner: Planner, layout: LayoutConfig, workload: Workload, rows: int) -> Shape:
    """Sizes of the forward; the decoder adds rows of nobody where tp does not divide them."""
    rows = math.ceil(rows / layout.tp) * layout.tp
    tokens = rows // layout.tp
    sent = tokens * planner.model.experts_per_token
    imbalance = planner.expert_imbalance if layout.ep > 1 else 1.0
    return Shape(
        rows=rows,
        tokens=tokens,
        sent=sent,
        routed=math.ceil(sent * layout.etp * imbalance),
        supervised=rows,
        keys=rows,
        gathered=0,
        halo=0,
        rotary_rows=rows,
        sums=0,
        pairs=rows * workload.context,
        row_bytes=READOUT,
        blocks=math.ceil(rows / workload.block_size),
    )


def _of_decoder(layout: LayoutConfig, rows: int) -> list[tuple[int, Message]]:
    """What replicas tell each other (generate/decoder.py): whether anybody runs, with dispatcher allgather
    the most rows of any, and the figures of branches.
    """
    messages = []
    if data_parallel_size(layout) > 1:
        sizes = (16, 8) if layout.dispatcher is Dispatcher.allgather else (16,)
        messages += [(1, Message("dp", "all_reduce", size, 1, 0)) for size in sizes]
    if layout.bp > 1:
        messages.append((1, Message("bp", "all_gather", 8.0 * FIGURES * rows * layout.bp, 1, 0)))
    return messages
