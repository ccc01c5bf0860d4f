"""The forms of scaling laws: a loss is a sum of terms, each an amplitude times powers of what a run chose.

    chinchilla   L = E + A / N^alpha + B / D^beta                              (arXiv 2203.15556, approach 3)
    dlcm         L = E + A_tok / (N (1 - P) + t_tok)^d_tok
                       + A_con R^g / (N P + t_con)^d_con
                       + A_data / (D + t_data)^d_data                          (arXiv 2512.24617)

N parameters, D tokens of training, R tokens per concept, P the concept backbone's share of the parameters.

A fit works on a vector of well-scaled numbers: of each term the logarithm of what it contributes at the
centre of the points (their geometric mean), exponents as they are, offsets t as log(t / centre).
Legend: n points, K terms, V numbers of the vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Columns = Mapping[str, Array]
"""Of each variable of a law its value at each point, [n]."""

APART = 1.05
"""Values nearer than this factor count as one: a share of the parameters is never quite the same twice."""
EXPONENT, FACTOR_EXPONENT = (1e-3, 4.0), (-4.0, 4.0)
OFFSET = (np.log(1e-6), np.log(10.0))
"""Limits of log(t / centre)."""
LEAST_SHARE = np.exp(-12.0)
"""A term's contribution at the centre is at least this share of the loss: in numbers, none."""


@dataclass(frozen=True)
class Term:
    """amplitude * factor^factor_exponent / (size + offset)^exponent; without an exponent the amplitude."""

    amplitude: str
    exponent: str = ""
    size: Callable[[Columns], Array] = lambda columns: np.ones(1)
    offset: str = ""
    factor: str = ""
    """A variable."""
    factor_exponent: str = ""

    @property
    def shape(self) -> tuple[str, ...]:
        """Its parameters besides the amplitude."""
        return tuple(name for name in (self.exponent, self.offset, self.factor_exponent) if name)


@dataclass(frozen=True)
class Law:
    """A form. `needs`: values that each variable must take at least, for the form to be determined."""

    name: str
    equation: str
    variables: tuple[str, ...]
    needs: Mapping[str, int]
    terms: tuple[Term, ...]

    @property
    def amplitudes(self) -> tuple[str, ...]:
        return tuple(term.amplitude for term in self.terms)

    @property
    def shape(self) -> tuple[str, ...]:
        """Exponents and offsets, in the order of the terms: what stands behind the amplitudes in a vector."""
        return tuple(name for term in self.terms for name in term.shape)

    @property
    def parameters(self) -> tuple[str, ...]:
        """In the order of a vector."""
        return self.amplitudes + self.shape

    @property
    def exponents(self) -> tuple[str, ...]:
        names = [name for term in self.terms for name in (term.exponent, term.factor_exponent)]
        return tuple(name for name in names if name)

    def shape_bounds(self) -> list[tuple[float, float]]:
        """Limits of the numbers behind the amplitudes."""
        limits: dict[str, tuple[float, float]] = {}
        for term in self.terms:
            kinds = (EXPONENT, OFFSET, FACTOR_EXPONENT)
            names = (term.exponent, term.offset, term.factor_exponent)
            limits |= dict(zip(names, kinds, strict=True))
        return [limits[name] for name in self.shape]

    def bounds(self, losses: Array) -> list[tuple[float, float]]:
        """Limits of a vector: a term contributes between nothing and somewhat more than the largest loss."""
        one = (float(np.log(losses.min() * LEAST_SHARE)), float(np.log(losses.max()) + 1))
        return [one] * len(self.terms) + self.shape_bounds()


@dataclass(frozen=True)
class Centred:
    """A law whose vectors count from the geometric mean of some points."""

    law: Law
    sizes: tuple[float, ...]
    """Of each term."""
    factors: tuple[float, ...]

    @classmethod
    def at(cls, law: Law, columns: Columns) -> Centred:
        """Centred at these points."""
        factors = [_middle(columns[term.factor]) if term.factor else 1.0 for term in law.terms]
        return cls(law, tuple(_middle(term.size(columns)) for term in law.terms), tuple(factors))

    def log_terms(self, columns: Columns, shape: Array) -> tuple[Array, Array]:
        """Logarithms of the terms with amplitude 1 at the centre, [K, n], and their slopes, [V - K, K, n]."""
        n = len(next(iter(columns.values())))
        logs_Kn, slopes = np.zeros((len(self.law.terms), n)), np.zeros((len(shape), len(self.law.terms), n))
        at = 0
        for k, term in enumerate(self.law.terms):
            if not term.exponent:
                continue
            size_n, exponent = term.size(columns) / self.sizes[k], shape[at]
            offset = np.exp(shape[at + 1]) if term.offset else 0.0
            logs_Kn[k] = -exponent * np.log(size_n + offset)
            slopes[at, k] = -np.log(size_n + offset)
            at += 1
            if term.offset:
                slopes[at, k] = -exponent * offset / (size_n + offset)
                at += 1
            if term.factor:
                log_factor_n = np.log(columns[term.factor] / self.factors[k])
                logs_Kn[k] += shape[at] * log_factor_n
                slopes[at, k] = log_factor_n
                at += 1
        return logs_Kn, slopes

    def log_loss(self, columns: Columns, vector: Array) -> tuple[Array, Array]:
        """log L at each point, [n], and its slopes, [V, n]."""
        count = len(self.law.terms)
        logs_Kn, slopes = self.log_terms(columns, vector[count:])
        logs_Kn = logs_Kn + vector[:count, None]
        most_n = logs_Kn.max(axis=0)
        terms_Kn = np.exp(logs_Kn - most_n)
        shares_Kn = terms_Kn / terms_Kn.sum(axis=0)
        log_loss_n = most_n + np.log(terms_Kn.sum(axis=0))
        return log_loss_n, np.concatenate([shares_Kn, (slopes * shares_Kn).sum(axis=1)])

    def values(self, vector: Array) -> dict[str, float]:
        """The law's own parameters: amplitudes at sizes of 1, offsets as sizes."""
        count = len(self.law.terms)
        found = dict(zip(self.law.shape, vector[count:].tolist(), strict=True))
        amplitudes = {}
        for k, term in enumerate(self.law.terms):
            log_amplitude = float(vector[k])
            if term.exponent:
                log_amplitude += found[term.exponent] * np.log(self.sizes[k])
            if term.factor:
                log_amplitude -= found[term.factor_exponent] * np.log(self.factors[k])
            if term.offset:
                found[term.offset] = float(np.exp(found[term.offset]) * self.sizes[k])
            amplitudes[term.amplitude] = float(np.exp(log_amplitude))
        return amplitudes | found


def groups(values: Iterable[float]) -> list[list[float]]:
    """Values in their order, those together that lie within a factor of APART of the group's smallest."""
    found: list[list[float]] = []
    for value in sorted(values):
        if found and value <= APART * found[-1][0]:
            found[-1].append(value)
        else:
            found.append([value])
    return found


def _middle(values: Array) -> float:
    """Geometric mean."""
    return float(np.exp(np.log(values).mean()))


CHINCHILLA = Law(
    name="chinchilla",
    equation="L(N, D) = E + A / N^alpha + B / D^beta",
    variables=("N", "D"),
    needs={"N": 3, "D": 3},
    terms=(
        Term("E"),
        Term("A", "alpha", lambda columns: columns["N"]),
        Term("B", "beta", lambda columns: columns["D"]),
    ),
)
DLCM = Law(
    name="dlcm",
    equation=(
        "L(N, D, R, P) = E + A_tok / (N (1 - P) + t_tok)^d_tok + A_con R^g / (N P + t_con)^d_con"
        " + A_data / (D + t_data)^d_data"
    ),
    variables=("N", "D", "R", "P"),
    needs={"N": 3, "D": 4, "R": 2, "P": 2},
    terms=(
        Term("E"),
        Term("A_tok", "d_tok", lambda columns: columns["N"] * (1 - columns["P"]), "t_tok"),
        Term("A_con", "d_con", lambda columns: columns["N"] * columns["P"], "t_con", "R", "g"),
        Term("A_data", "d_data", lambda columns: columns["D"], "t_data"),
    ),
)
