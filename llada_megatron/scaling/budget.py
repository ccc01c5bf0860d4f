"""What a budget of FLOPs buys by a law: the size and the tokens with the lowest loss.

A token costs k N^m FLOPs, fitted to what `config/flops.py` says of the runs (m is near 1 and not 1: attention
and embeddings do not grow as the rest). With C = k N^m D the loss L(N, D) is lowest where
alpha A N^-alpha = m beta B D^-beta:

    N = (alpha A / (m beta B) * (C / k)^beta) ^ (1 / (alpha + m beta)),   D = C / (k N^m)

DLCM's law is asked at given R and P. A token costs k (N (1 - P + P / R))^m: one in R passes the backbone.
Its terms have offsets, so the lowest loss is searched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llada_megatron.scaling.fit import Fit, middle
from llada_megatron.scaling.laws import CHINCHILLA, Array
from llada_megatron.scaling.points import FLOPS_PER_PARAMETER, Point, passed

LARGEST_LOG = 700.0
"""exp of more is infinite: an exponent that is nearly 0 asks for any size."""
SEARCHED, SEARCH_STEPS = (1e-4, 1e6), 200
"""Where a best size is searched, times the largest of the points'; in two passes of so many steps."""


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of training per token, k N^m with N the parameters that it passes."""

    k: float
    m: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> TokenFlops:
        """Fitted to runs; 6 N where points come from a file."""
        known = {passed(point.variables): point.flops_per_token for point in points if point.flops_per_token}
        if len(known) < 2:
            return cls(FLOPS_PER_PARAMETER, 1.0)
        m, log_k = np.polyfit(np.log(list(known)), np.log(list(known.values())), 1)
        return cls(float(np.exp(log_k)), float(m))

    def at(self, shape: Mapping[str, float]) -> TokenFlops:
        """Of all of N, where R and P are these."""
        return TokenFlops(self.k * passed({"N": 1.0, **shape}) ** self.m, self.m)

    def __call__(self, size: Array) -> Array:
        """FLOPs of a token for models of these sizes."""
        return np.asarray(self.k * size**self.m)


@dataclass(frozen=True)
class Optimum:
    """The best that a budget buys; intervals as of the fit."""

    flops: float
    times_largest: float
    """The budget over that of the run that cost most."""
    size: float
    size_interval: tuple[float, float]
    tokens: float
    tokens_interval: tuple[float, float]
    loss: float
    loss_interval: tuple[float, float]


def optima(
    found: Fit,
    points: Sequence[Point],
    budgets: Sequence[float],
    cost: TokenFlops,
    shape: Mapping[str, float],
) -> list[Optimum]:
    """What each budget buys at R and P of `shape` (empty for L(N, D)), by what a token costs there."""
    largest = max(point.flops for point in points)
    sizes_n = np.geomspace(*SEARCHED, SEARCH_STEPS) * max(point.variables["N"] for point in points)

    def best(vector: Array, budget: float) -> tuple[float, float, float]:
        if found.law is CHINCHILLA:
            return _best(found.centred.values(vector), budget, cost)
        return _searched(found, vector, budget, cost, shape, sizes_n)

    result = []
    for budget in budgets:
        drawn = [best(vector, budget) for vector in found.draws_BV]
        sizes, tokens, losses = (middle(list(each)) for each in zip(*drawn, strict=True))
        size, token, loss = best(found.vector, budget)
        result.append(Optimum(budget, budget / largest, size, sizes, token, tokens, loss, losses))
    return result


def _best(law: dict[str, float], budget: float, cost: TokenFlops) -> tuple[float, float, float]:
    """N, D and the loss."""
    alpha, beta = law["alpha"], law["beta"]
    log_ratio = np.log(alpha) + np.log(law["A"]) - np.log(cost.m * beta) - np.log(law["B"])
    log_size = (log_ratio + beta * np.log(budget / cost.k)) / (alpha + cost.m * beta)
    log_tokens = np.log(budget / cost.k) - cost.m * log_size
    terms = (np.log(law["A"]) - alpha * log_size, np.log(law["B"]) - beta * log_tokens)
    numbers = np.exp(np.clip([log_size, log_tokens, *terms], -LARGEST_LOG, LARGEST_LOG))
    return float(numbers[0]), float(numbers[1]), law["E"] + float(numbers[2:].sum())


def _searched(
    found: Fit, vector: Array, budget: float, cost: TokenFlops, shape: Mapping[str, float], sizes_n: Array
) -> tuple[float, float, float]:
    """N, D and the loss: the lowest along sizes, and again between its neighbours."""
    for _ in range(2):
        columns = {name: np.full(len(sizes_n), value) for name, value in shape.items()}
        columns |= {"N": sizes_n, "D": budget / cost(sizes_n)}
        log_loss_n = found.centred.log_loss(columns, vector)[0]
        lowest = int(log_loss_n.argmin())
        result = float(sizes_n[lowest]), float(columns["D"][lowest]), float(np.exp(log_loss_n[lowest]))
        sizes_n = np.geomspace(
            sizes_n[max(lowest - 1, 0)], sizes_n[min(lowest + 1, SEARCH_STEPS - 1)], SEARCH_STEPS
        )
    return result


def default_budgets(points: Sequence[Point]) -> list[float]:
    """What the costliest run cost, and 10 and 100 times that."""
    largest = max(point.flops for point in points)
    return [largest, 10 * largest, 100 * largest]
