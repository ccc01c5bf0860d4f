"""What parallel decoding costs in accuracy: points of accuracy over tokens per forward, and AUP, their area.

Accuracy Under Parallelism is d3LLM's (Qian et al., arXiv 2601.07568). Over points (rho_i, y_i), tokens per
forward and accuracy in percent, in the order of rho, without those where y_i < y_1 - 5:

    AUP = rho_1 y_1 + sum_{i > 1} (rho_i - rho_{i-1}) / 2 (y_i W_i + y_{i-1} W_{i-1})
    W_i = min(exp(-3 (1 - y_i / y_max)), 1)

y_max is the best accuracy of anything that is compared on the task, so AUP says something among those alone.
Standard library alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

STEEPNESS = 3.0
TOLERATED_LOSS = 5.0
"""Points of a percentage below y_1."""


@dataclass(frozen=True)
class Point:
    """One decoding of one model on one task."""

    tokens_per_forward: float
    accuracy: float
    """In percent."""
    error: float | None
    """The accuracy's standard error, in percent; None where there is none."""
    decoding: str


def in_order(points: Sequence[Point]) -> list[Point]:
    """By tokens per forward, of equals the more accurate first."""
    return sorted(points, key=lambda point: (point.tokens_per_forward, -point.accuracy))


def counted(points: Sequence[Point]) -> list[Point]:
    """The points that AUP counts: none that lost more than 5 percent points against the slowest."""
    ordered = in_order(points)
    return [point for point in ordered if point.accuracy >= ordered[0].accuracy - TOLERATED_LOSS]


def aup(points: Sequence[Point], best: float) -> float:
    """d3LLM's AUP; best: y_max in percent, at least the points' own accuracies. 0 for no points."""
    kept = counted(points)
    if not kept:
        return 0.0

    def weighted(point: Point) -> float:
        lost = 1 - point.accuracy / best if best else 0.0
        return point.accuracy * min(math.exp(-STEEPNESS * lost), 1.0)

    first = kept[0].tokens_per_forward * kept[0].accuracy
    return first + sum(
        (after.tokens_per_forward - before.tokens_per_forward) / 2 * (weighted(after) + weighted(before))
        for before, after in pairwise(kept)
    )


def unweighted_aup(points: Sequence[Point]) -> float:
    """The form of MBD-LMs (arXiv 2606.29215): the trapezoids alone, of all points, without weights.

    0 for a single point, since the rectangle before the first is left out.
    """
    return sum(
        (after.tokens_per_forward - before.tokens_per_forward) / 2 * (after.accuracy + before.accuracy)
        for before, after in pairwise(in_order(points))
    )
