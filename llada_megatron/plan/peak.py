"""The peak of a step on a pipeline rank: micro-batches in flight, and what runs beside them.

With layout.overlap_experts megatron-core (model_chunk_schedule_plan.py) runs a forward's first layer beside
the last layer of another micro-batch's backward, and so on: one grows while the other lets go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import zip_longest

from llada_megatron.config.contents import Contents
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.plan.memory import Layers, Unit, Units

Pair = tuple[tuple[int, ...], int | None, int]
"""Micro-batches of each virtual stage that wait for their backward, the virtual stage that runs a forward, if
any does, and that of the backward beside it."""


def peak_activations(
    blocks: Units, stages: Sequence[Contents], layout: LayoutConfig, rank: int, micro_batches: int
) -> tuple[int, tuple[int, ...], int]:
    """Of a pipeline rank's peak: bytes kept and held, micro-batches in flight per virtual stage, and bytes of
    what is alive for a moment."""
    sizes = [blocks.kept(stage) for stage in stages]
    held = blocks.gathering + sum(blocks.held(stage) for stage in stages)
    given = layout.pp, rank, layout.vpp, min(micro_batches, 4 * layout.pp * layout.vpp)
    if layout.overlap_experts:
        assert isinstance(blocks, Layers)  # others refuse it
        moments = [
            (counts, beside(blocks, None if forward is None else stages[forward], stages[backward]))
            for counts, forward, backward in pairs(*given)
        ]
    else:
        transient = blocks.transient(stages)
        moments = [(counts, transient) for counts in in_flight(*given)]
    return max(
        (
            (held + sum(count * size for count, size in zip(counts, sizes, strict=True)), counts, transient)
            for counts, transient in moments
        ),
        key=lambda moment: moment[0] + moment[2],
    )


@lru_cache(maxsize=4096)
def in_flight(pp: int, rank: int, vpp: int, micro_batches: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches of each virtual stage that wait for their backward, at the moments that can be the peak.

    Without interleaving a rank runs pp - rank - 1 forwards ahead, then one forward and one backward by turns:
    min(pp - rank, m). Interleaved (megatron-core's schedules.py, get_pp_rank_microbatches) it runs
    2(pp - rank - 1) + (vpp - 1) pp ahead; forwards take the virtual stages by turns, pp micro-batches of
    each, and backwards take them in reverse. The counts repeat every pp*vpp forwards; of each period the
    largest ones are returned.
    """
    if vpp == 1:
        return ((min(pp - rank, micro_batches),),)
    total = micro_batches * vpp
    ahead = forwards_ahead(pp, rank, vpp, micro_batches, overlapped=False)
    live = [0] * vpp
    for index in range(ahead):
        live[index // pp % vpp] += 1
    moments = {tuple(live)}
    for index in range(min(total - ahead, 2 * pp * vpp)):
        live[(ahead + index) // pp % vpp] += 1
        moments.add(tuple(live))
        live[vpp - 1 - index // pp % vpp] -= 1
    largest = [
        one
        for one in moments
        if not any(one != other and all(a <= b for a, b in zip(one, other, strict=True)) for other in moments)
    ]
    return tuple(sorted(largest))


def forwards_ahead(pp: int, rank: int, vpp: int, micro_batches: int, overlapped: bool) -> int:
    """Forwards of virtual stages that a rank runs before its first backward; `overlapped` experts ask for one
    more."""
    ahead = 2 * (pp - rank - 1) + (vpp - 1) * pp if vpp > 1 else pp - rank - 1
    return min(ahead + overlapped, micro_batches * vpp)


@lru_cache(maxsize=4096)
def pairs(pp: int, rank: int, vpp: int, micro_batches: int) -> tuple[Pair, ...]:
    """Every kind of pair that a rank runs; order and number ahead are those of `in_flight`."""
    total = micro_batches * vpp
    ahead = forwards_ahead(pp, rank, vpp, micro_batches, overlapped=True)
    live = [0] * vpp
    for index in range(ahead):
        live[index // pp % vpp] += 1
    found: dict[Pair, None] = {}
    for index in range(min(total - ahead + 1, 2 * pp * vpp)):
        forward = (ahead + index) // pp % vpp if ahead + index < total else None
        backward = vpp - 1 - index // pp % vpp
        found[tuple(live), forward, backward] = None
        if forward is not None:
            live[forward] += 1
        live[backward] -= 1
    return tuple(found)


def beside(units: Layers, forward: Contents | None, backward: Contents) -> int:
    """The most that a pair needs at any moment, over what its backward's micro-batch has kept before.

    A layer's last probabilities (activations.held_bytes) hold the gradient of its input, b tH, until the next
    forward through it; those of other virtual stages are left out.
    """
    return max(_moments(units, forward, backward), default=0)  # none of a stage that holds nothing


def _moments(units: Layers, forward: Contents | None, backward: Contents) -> Iterator[int]:
    grown, gone = 0, 0
    if forward is not None:
        grown = units.stage.kept + forward.first * (units.embedding.kept + units.hidden)
    if backward.last:
        yield grown + units.head.backward
        gone = units.head.kept
    if forward is not None and forward.first:
        grown -= units.hidden  # from here on its first layer's
    layers = zip_longest(_layers(units, forward), reversed(_layers(units, backward)))
    for done, (ours, theirs) in enumerate(layers):
        stuck = units.hidden * min(done, max(backward.layers - done, 0))
        if ours is not None and theirs is not None:  # of experts, or a dense MLP, there are one's at a time
            yield stuck + grown + ours.kept - ours.inside - gone + theirs.backward
            yield stuck + grown + ours.kept + ours.forward - gone - theirs.inside + theirs.travelling
            yield stuck + grown + ours.kept - gone + _attention_behind(units, theirs, forward, done)
        elif theirs is not None:
            yield stuck + grown - gone + max(theirs.backward, theirs.attention)
        elif ours is not None:
            yield stuck + grown - gone + ours.kept + ours.forward
        grown += ours.kept if ours is not None else 0
        gone += theirs.kept if theirs is not None else 0
    if forward is not None and forward.last:
        yield grown - gone + units.normed.kept + units.head.kept + units.head.forward + units.hidden
        grown += units.normed.kept + units.head.kept
    if backward.first:
        yield grown - gone + units.embedding.backward


def _attention_behind(units: Layers, theirs: Unit, forward: Contents | None, done: int) -> int:
    """Of a pair's last moment, attention's backward behind the other's whole layer.

    Gradients that travelled are still held, and where that layer was the last one, its output and the final
    norm's.
    """
    is_last = forward is not None and forward.last and done == forward.layers - 1
    normed = units.normed.kept + units.hidden if is_last else 0
    return theirs.attention + theirs.travelling - units.hidden + normed


def _layers(units: Layers, contents: Contents | None) -> list[Unit]:
    if contents is None:
        return []
    return [units.dense] * contents.dense + [units.moe] * contents.moe
