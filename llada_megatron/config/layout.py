"""Arithmetic of a layout: who sits where in the process grid, and which layers a pipeline stage holds.

megatron-core lays two grids over the same ranks, each with its first axis varying fastest (the order
"tp-cp-ep-dp-pp" of parallel_state.initialize_model_parallel): tp, cp, dp, pp for what every token passes,
and etp, ep, expert dp, pp for the experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import LayoutConfig


@dataclass(frozen=True)
class Coordinates:
    """Where a rank sits in both grids."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    expert_dp: int


DENSE_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "expert_dp", "pp")


def data_parallel_size(layout: LayoutConfig) -> int:
    """dp = processes / (tp cp pp)."""
    return layout.processes // (layout.tp * layout.cp * layout.pp)


def expert_data_parallel_size(layout: LayoutConfig) -> int:
    """Processes that hold the same experts: processes / (etp ep pp)."""
    return layout.processes // (layout.etp * layout.ep * layout.pp)


def coordinates(layout: LayoutConfig, rank: int) -> Coordinates:
    """The coordinates of a rank, 0 <= rank < layout.processes."""
    found = {}
    for axes in (DENSE_AXES, EXPERT_AXES):
        rest = rank
        for axis in axes:
            rest, found[axis] = divmod(rest, _size(layout, axis))
    return Coordinates(**found)


def rank_at(layout: LayoutConfig, **at: int) -> int:
    """The rank at tp, cp, dp, pp, or at etp, ep, expert_dp, pp; BadInput for axes of no grid."""
    for axes in (DENSE_AXES, EXPERT_AXES):
        if at.keys() == set(axes):
            rank = 0
            for axis in reversed(axes):
                rank = rank * _size(layout, axis) + at[axis]
            return rank
    raise BadInput(f"{sorted(at)} are the axes of no grid: give all of {DENSE_AXES} or of {EXPERT_AXES}.")


def smallest_world(layout: LayoutConfig) -> int:
    """The fewest processes that both grids fill evenly."""
    return math.lcm(layout.tp * layout.cp * layout.pp * layout.bp, layout.etp * layout.ep * layout.pp)


def pipeline_stages(layers: int, layout: LayoutConfig) -> list[int]:
    """Layers of each of the pp*vpp stages in the data's order; stage i lies on pp rank i % pp."""
    stages = layout.pp * layout.vpp
    return list(layout.pipeline) or [layers // stages] * stages


def micro_batches_per_step(layout: LayoutConfig, stage: Stage) -> int:
    """Micro-batches that each pipeline runs through in a step."""
    return stage.global_batch // (stage.micro_batch * data_parallel_size(layout))


def _size(layout: LayoutConfig, axis: str) -> int:
    if axis == "dp":
        return data_parallel_size(layout)
    return expert_data_parallel_size(layout) if axis == "expert_dp" else int(getattr(layout, axis))
