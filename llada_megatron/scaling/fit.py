"""A law fitted to points, and how sure it is.

    minimise over the parameters   sum over points  Huber(log L(point) - log loss),   delta = 0.001

by L-BFGS, as approach 3 of arXiv 2203.15556, with what arXiv 2404.10102 found wrong there mended: a sum, not
a mean, tight tolerances, parameters that are not rounded. Starts: the shape (exponents, offsets) from a
Sobol sequence, amplitudes by non-negative least squares, the best of them descended from.

Intervals: the points are drawn again with replacement, the law is fitted to each draw, and the middle 90% of
what these say is the interval. That of a run's loss has the scatter of runs around the law added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, nnls
from scipy.stats import qmc

from llada_megatron.config.errors import BadInput
from llada_megatron.config.quantities import so_many
from llada_megatron.scaling.laws import Array, Centred, Columns, Law, groups

HUBER_DELTA = 1e-3
LEVEL = 0.9
"""Of the intervals."""
LOG2_STARTS = {2: 7}
"""Of the sequence, by the numbers of a shape; others: DEFAULT_LOG2_STARTS."""
DEFAULT_LOG2_STARTS = 10
DESCENTS = 8
OPTIONS = {"maxiter": 5000, "maxfun": 20_000, "ftol": 1e-14, "gtol": 1e-8, "maxcor": 20}
NEAR = 1e-3
"""A number of the vector so close to a limit ended there."""
MAX_DRAWS = 50
"""So many draws of the points for one in which every variable takes the values that a law needs."""


@dataclass(frozen=True)
class Fit:
    """A fitted law. n points, V numbers of a vector, B draws of the points."""

    centred: Centred
    vector: Array
    limits_V2: Array
    """What the vector was kept within."""
    residuals_n: Array
    """log loss - log L of the points."""
    draws_BV: Array
    """Vectors fitted to the points drawn again."""
    scatter_B: Array
    """Draws of how far a run lies from the law, in log L."""

    @property
    def law(self) -> Law:
        return self.centred.law

    @property
    def rms(self) -> float:
        """Of the residuals with the freedom that the parameters took given back, relative to the loss."""
        freedom = max(1, len(self.residuals_n) - len(self.vector))
        return float(np.sqrt((self.residuals_n**2).sum() / freedom))

    def values(self) -> dict[str, float]:
        """The law's parameters by name."""
        return self.centred.values(self.vector)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The middle 90% of each parameter."""
        drawn = [self.centred.values(vector) for vector in self.draws_BV]
        return {name: middle([one[name] for one in drawn]) for name in self.law.parameters}

    def at_limit(self) -> set[str]:
        """Parameters that ended at a limit of what is tried."""
        near_V = np.abs(self.vector[:, None] - self.limits_V2).min(axis=1) < NEAR
        return {name for name, near in zip(self.law.parameters, near_V, strict=True) if near}

    def loss(self, columns: Columns) -> Array:
        """What the law says at these points, [n]."""
        return np.exp(self.centred.log_loss(columns, self.vector)[0])

    def drawn_losses(self, columns: Columns) -> Array:
        """What the fits to drawn points say there, [B, n]."""
        return np.exp([self.centred.log_loss(columns, vector)[0] for vector in self.draws_BV])

    def run_intervals(self, columns: Columns) -> list[tuple[float, float]]:
        """Of each point where the loss of a new run lies: the law's uncertainty, and the scatter of runs."""
        losses_Bn = self.drawn_losses(columns) * np.exp(self.scatter_B)[:, None]
        return [middle(losses) for losses in losses_Bn.T]


def middle(values: Array | list[float]) -> tuple[float, float]:
    """The interval that holds the middle 90% of values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def check(law: Law, columns: Columns, draws: int) -> None:
    """Raise BadInput where the points cannot determine the law."""
    count, parameters = len(columns["D"]), len(law.parameters)
    if count <= parameters:
        raise BadInput(
            f"{so_many(count, 'point')} cannot fit the {parameters} parameters of {law.equation}: give at"
            f" least {parameters + 1}, each a run's end."
        )
    for name, needed in law.needs.items():
        found = len(groups(columns[name]))
        if found < needed:
            raise BadInput(
                f"The points have {so_many(found, 'value')} of {name}, and {law.equation} needs {needed}: add"
                f" runs of other {name}."
            )
    if draws < 20:
        raise BadInput(f"--bootstrap {draws} tells no interval: give at least 20, for example 500.")


def fit(law: Law, columns: Columns, losses_n: Array, *, draws: int, seed: int = 0) -> Fit:
    """The law that fits these points best, with `draws` fits to points drawn again.

    Raises BadInput where the points cannot determine the law (`check`).
    """
    check(law, columns, draws)
    centred = Centred.at(law, columns)
    starts = _starts(centred, columns, losses_n)
    best = min((_descend(centred, columns, losses_n, start) for start in starts), key=lambda found: found[0])[
        1
    ]
    residuals_n = np.log(losses_n) - centred.log_loss(columns, best)[0]
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        index_n = _draw(law, columns, generator)
        part = {name: values[index_n] for name, values in columns.items()}
        drawn.append(_descend(centred, part, losses_n[index_n], best)[1])
    count = len(losses_n)
    scale = np.sqrt(count / (count - len(best)))  # a law with many parameters comes closer than runs do
    scatter_B = scale * generator.choice(residuals_n, draws)
    limits_V2 = np.array(law.bounds(losses_n))
    return Fit(centred, best, limits_V2, residuals_n, np.array(drawn), scatter_B)


def _draw(law: Law, columns: Columns, generator: np.random.Generator) -> Array:
    """Indices of the points drawn with replacement, such that they can determine the law."""
    count = len(columns["D"])
    for _ in range(MAX_DRAWS):
        index_n = generator.integers(0, count, count)
        if all(len(groups(columns[name][index_n])) >= needed for name, needed in law.needs.items()):
            break
    return index_n


def _objective(centred: Centred, columns: Columns, losses_n: Array) -> Callable[[Array], tuple[float, Array]]:
    log_losses_n = np.log(losses_n)

    def objective(vector: Array) -> tuple[float, Array]:
        """The sum of Huber losses in units of delta^2, and its slopes."""
        log_loss_n, slopes_Vn = centred.log_loss(columns, vector)
        off_n = (log_loss_n - log_losses_n) / HUBER_DELTA
        far_n = np.abs(off_n)
        huber_n = np.where(far_n <= 1, off_n**2 / 2, far_n - 0.5)
        return float(huber_n.sum()), slopes_Vn @ np.clip(off_n, -1, 1) / HUBER_DELTA

    return objective


def _descend(centred: Centred, columns: Columns, losses_n: Array, start: Array) -> tuple[float, Array]:
    """The objective and the vector where L-BFGS ends."""
    found = minimize(
        _objective(centred, columns, losses_n),
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=centred.law.bounds(losses_n),
        options=OPTIONS,
    )
    return float(found.fun), found.x


def _starts(centred: Centred, columns: Columns, losses_n: Array) -> list[Array]:
    """The vectors to descend from: shapes spread over their limits, amplitudes that fit best beside each."""
    law = centred.law
    low, high = np.array(law.shape_bounds()).T
    low, high = np.maximum(low, -2), np.minimum(high, 2)  # further out, a term is nearly a constant or a step
    dims = len(law.shape)
    sequence = qmc.Sobol(dims, scramble=False).random_base2(LOG2_STARTS.get(dims, DEFAULT_LOG2_STARTS))
    objective, bounds = _objective(centred, columns, losses_n), np.array(law.bounds(losses_n))
    found = []
    for shape in low + sequence * (high - low):
        terms_Kn = np.exp(centred.log_terms(columns, shape)[0])
        amplitudes, _ = nnls((terms_Kn / losses_n).T, np.ones(len(losses_n)))
        with np.errstate(divide="ignore"):
            vector = np.clip(np.concatenate([np.log(amplitudes), shape]), *bounds.T)
        found.append((objective(vector)[0], vector))
    found.sort(key=lambda one: one[0])
    return [vector for _, vector in found[:DESCENTS]]
