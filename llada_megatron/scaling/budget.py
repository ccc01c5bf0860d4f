"""What a budget of FLOPs buys by a law L(N, D): the size and the tokens with the lowest loss.

A token costs k N^m FLOPs, fitted to what `config/flops.py` says of the runs (m is near 1 and not 1: attention
and embeddings do not grow as the rest). With C = k N^m D the loss is lowest where
alpha A N^-alpha = m beta B D^-beta:

    N = (alpha A / (m beta B) * (C / k)^beta) ^ (1 / (alpha + m beta)),   D = C / (k N^m)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llada_megatron.scaling.fit import Fit, middle
from llada_megatron.scaling.points import FLOPS_PER_PARAMETER, Point

LARGEST_LOG = 700.0
"""exp of more is infinite: an exponent that is nearly 0 asks for any size."""


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of training per token, k N^m."""

    k: float
    m: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> TokenFlops:
        """Fitted to runs; 6 N where points come from a file."""
        known = {point.variables["N"]: point.flops_per_token for point in points if point.flops_per_token}
        if len(known) < 2:
            return cls(FLOPS_PER_PARAMETER, 1.0)
        m, log_k = np.polyfit(np.log(list(known)), np.log(list(known.values())), 1)
        return cls(float(np.exp(log_k)), float(m))

    def __call__(self, size: float) -> float:
        """FLOPs of a token for a model of this size."""
        return float(self.k * size**self.m)


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


def optima(found: Fit, points: Sequence[Point], budgets: Sequence[float], cost: TokenFlops) -> list[Optimum]:
    """What each budget buys by a law L(N, D)."""
    largest = max(point.flops for point in points)
    result = []
    for budget in budgets:
        drawn = [_best(found.centred.values(vector), budget, cost) for vector in found.draws_BV]
        sizes, tokens, losses = (middle(list(each)) for each in zip(*drawn, strict=True))
        size, token, loss = _best(found.values(), budget, cost)
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


def default_budgets(points: Sequence[Point]) -> list[float]:
    """What the costliest run cost, and 10 and 100 times that."""
    largest = max(point.flops for point in points)
    return [largest, 10 * largest, 100 * largest]
