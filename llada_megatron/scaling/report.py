"""What a fit says: tables for a terminal, the content of its JSON file, and what in it is not sure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llada_megatron.config.quantities import short_count
from llada_megatron.scaling.budget import Optimum, TokenFlops
from llada_megatron.scaling.fit import LEVEL, Fit
from llada_megatron.scaling.points import Point, columns_of

UNSURE = 10.0
"""An exponent or E whose interval spans more than this factor is not determined."""
FAR = 100.0
"""A size that spans more says nothing, and a budget so many times the largest run's is far out."""


ADD_RUNS = "Add runs further apart in {variables}: such a law says little beyond its points."
NARROWEST = 100
"""Columns of a page, in pipes too: narrower ones would cut intervals off."""
MAX_SHOWN = 30
"""Points in a terminal; the JSON file has all."""


@dataclass(frozen=True)
class Prediction:
    """A run that took no part in the fit, and what the law says of it."""

    point: Point
    loss: float
    interval: tuple[float, float]

    @property
    def inside(self) -> bool:
        return self.interval[0] <= self.point.loss <= self.interval[1]


@dataclass(frozen=True)
class Findings:
    """A fit with all that is shown of it."""

    fit: Fit
    points: list[Point]
    loss: str
    counted: str
    """What N counts."""
    held_out: list[Prediction]
    optima: list[Optimum]
    shape: dict[str, float]
    """R and P that budgets are spent at; of L(N, D) nothing."""
    cost: TokenFlops | None
    """Of a token at that shape."""
    remarks: list[str]


def predictions(fit: Fit, points: Sequence[Point]) -> list[Prediction]:
    """What a law says of points that it was not fitted to."""
    if not points:
        return []
    columns = columns_of(fit.law, points)
    each = zip(points, fit.loss(columns), fit.run_intervals(columns), strict=True)
    return [Prediction(point, float(loss), interval) for point, loss, interval in each]


def doubts(fit: Fit) -> dict[str, str]:
    """Which of E and the exponents the points do not determine, and a sentence for each."""
    intervals, at_limit, found = fit.intervals(), fit.at_limit(), {}
    for name in (fit.law.amplitudes[0], *fit.law.exponents):
        low, high = intervals[name]
        if name in at_limit:
            why = f"it ended at {_number(fit.values()[name])}, a limit of what is tried"
        elif low * high <= 0 or not 1 / UNSURE <= high / low <= UNSURE:
            why = f"{_number(low)} to {_number(high)} fits as well"
        else:
            continue
        found[name] = f"{name} is not determined by these points: {why}."
    return found


def misses(predicted: Sequence[Prediction]) -> list[str]:
    """Which runs a law did not foresee, in sentences."""
    return [
        f"{one.point.name} lies outside what was predicted: the law does not hold as far as this run."
        for one in predicted
        if not one.inside
    ]


def content(found: Findings) -> dict[str, Any]:
    """Of the JSON file; losses in nats per token."""
    values, intervals = found.fit.values(), found.fit.intervals()
    return {
        "schema": 1,
        "law": found.fit.law.name,
        "equation": found.fit.law.equation,
        "loss": found.loss,
        "parameters_counted": found.counted,
        "level": LEVEL,
        "draws": len(found.fit.draws_BV),
        "parameters": {
            name: {"value": values[name], "low": low, "high": high} for name, (low, high) in intervals.items()
        },
        "rms_of_log_loss": found.fit.rms,
        "points": [
            _point(point) | {"fitted": loss} for point, loss in zip(found.points, _fitted(found), strict=True)
        ],
        "held_out": [
            _point(one.point)
            | {"predicted": one.loss, "low": one.interval[0], "high": one.interval[1], "inside": one.inside}
            for one in found.held_out
        ],
        "flops_per_token": found.cost and asdict(found.cost),
        "optima": [found.shape | asdict(optimum) for optimum in found.optima],
        "remarks": found.remarks,
    }


def _point(point: Point) -> dict[str, Any]:
    own = {"loss": point.loss, "se": point.error, "flops": point.flops}
    return {"name": point.name, **point.variables, **own}


def _fitted(found: Findings) -> list[float]:
    losses: list[float] = found.fit.loss(columns_of(found.fit.law, found.points)).tolist()
    return losses


def print_findings(found: Findings) -> None:
    """Print the law, its points, what it says of others, and what budgets buy."""
    console = Console(highlight=False)
    console.width = max(console.width, NARROWEST)
    law = found.fit.law
    console.print(law.equation, style="bold", markup=False, soft_wrap=True)
    console.print(
        f"loss {found.loss}, nats per token; N: {found.counted}; {LEVEL:.0%} intervals of"
        f" {len(found.fit.draws_BV)} draws of the points; runs lie {found.fit.rms:.2%} from the law",
        soft_wrap=True,
    )
    console.print(_parameters(found))
    headers = ("", *law.variables, "found", "law", "off by")
    fitted, title = list(zip(found.points, _fitted(found), strict=True)), "Fitted"
    if len(fitted) > MAX_SHOWN:
        title = f"Fitted, the {MAX_SHOWN} furthest off of {len(fitted)}"
        fitted = sorted(fitted, key=lambda one: -abs(one[1] / one[0].loss - 1))[:MAX_SHOWN]
    table = _table(title, headers)
    for point, loss in fitted:
        table.add_row(*_cells(point, loss))
    console.print(table)
    if found.held_out:
        table = _table("Held out", (*headers, f"{LEVEL:.0%} of runs", "inside"))
        for one in found.held_out:
            low, high = one.interval
            inside = "yes" if one.inside else "no"
            table.add_row(*_cells(one.point, one.loss), f"{low:.3f} to {high:.3f}", inside)
        console.print(table)
    if found.optima:
        console.print(_budgets(found))
    for remark in found.remarks:
        console.print(remark, style="yellow", markup=False, soft_wrap=True)


def _parameters(found: Findings) -> Table:
    table = _table("Parameters", ("", "value", "low", "high"))
    values = found.fit.values()
    for name, (low, high) in found.fit.intervals().items():
        table.add_row(name, _number(values[name]), _number(low), _number(high))
    return table


def _cells(point: Point, loss: float) -> list[str | Text]:
    variables = [_variable(name, value) for name, value in point.variables.items()]
    off = f"{loss / point.loss - 1:+.2%}"
    return [Text(point.name, overflow="fold"), *variables, f"{point.loss:.4f}", f"{loss:.4f}", off]


def _variable(name: str, value: float) -> str:
    return short_count(value) if name in ("N", "D") else f"{value:.3g}"


def _budgets(found: Findings) -> Table:
    headers = ("FLOPs", "of largest", "N", f"{LEVEL:.0%}", "D", "D / N", "loss", f"{LEVEL:.0%} ")
    at = "".join(f", {name} = {_variable(name, value)}" for name, value in found.shape.items())
    table = _table(f"What a budget buys: the size and tokens of the lowest loss{at}", headers)
    for best in found.optima:
        table.add_row(
            f"{best.flops:.2g}",
            f"{best.times_largest:.3g}x",
            _size(best.size),
            " to ".join(map(_size, best.size_interval)),
            _size(best.tokens),
            f"{best.tokens / best.size:.2g}",
            f"{best.loss:.3f}",
            " to ".join(f"{loss:.3f}" for loss in best.loss_interval),
        )
    return table


def _size(value: float) -> str:
    return short_count(value) if 1 <= value < 1e15 else f"{value:.0e}"


def budget_doubts(optima: Sequence[Optimum]) -> list[str]:
    """What of a table of budgets rests on little, in sentences."""
    found = []
    wide = [one for one in optima if one.size_interval[1] > FAR * one.size_interval[0]]
    if wide:
        found.append(
            f"The best size at {wide[0].flops:.2g} FLOPs is not determined: its interval spans more than a"
            f" factor of {FAR:.0f}."
        )
    far = [one for one in optima if one.times_largest > FAR]
    if far:
        found.append(
            f"{far[0].flops:.2g} FLOPs are {far[0].times_largest:.3g} times the largest run's: no run here"
            " says whether the law holds so far out."
        )
    return found


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1e5 else f"{value:.2e}"


def _table(title: str, headers: Sequence[str], *, left: Sequence[str] = ("",)) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="", box=None, pad_edge=False)
    for header in headers:
        is_left = header in left
        table.add_column(header, justify="left" if is_left else "right", no_wrap=not is_left)
    return table
