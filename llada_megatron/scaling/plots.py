"""The picture of a law: its points and curves, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llada_megatron.config.colours import BLUE, GREEN, GREY, LIGHT, ORANGE, PURPLE, SKY, VERMILION
from llada_megatron.config.quantities import short_count
from llada_megatron.scaling.fit import LEVEL, Fit, middle
from llada_megatron.scaling.laws import CHINCHILLA, Array, Columns, groups
from llada_megatron.scaling.points import Point, columns_of
from llada_megatron.scaling.report import Findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = 100
"""Of a curve."""
LINES = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
MAX_COLOURS = 6
"""More sizes than these are told apart by a shade, not by a colour."""
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
}


def draw(found: Findings, path: Path) -> None:
    """Write a PNG: loss over tokens by size, of DLCM what R and P do to it; and loss over size by budget."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        panels = [_over_tokens] if found.fit.law is CHINCHILLA else [_off, _over_ratios]
        if found.optima:
            panels.append(_over_sizes)
        figure = Figure(figsize=(2 + 5.5 * len(panels), 5), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            panel(axes, found)
            axes.grid(axis="y", color="#e4e4e4")
            axes.set_axisbelow(True)
        figure.suptitle(_title(found), x=0.01, ha="left", fontsize=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, format="png")


def _title(found: Findings) -> str:
    values, intervals = found.fit.values(), found.fit.intervals()
    shown = [
        f"{name} {values[name]:.2f} ({intervals[name][0]:.2f} to {intervals[name][1]:.2f})"
        for name in (found.fit.law.amplitudes[0], *found.fit.law.exponents)
    ]
    return f"{found.fit.law.equation}\n{', '.join(shown)}\nbands and brackets: {LEVEL:.0%}"


def _colours(values: Sequence[float]) -> dict[float, Any]:
    """A colour for each value, in their order."""
    from matplotlib import colormaps

    several = sorted(set(values))
    if len(several) <= MAX_COLOURS:
        return dict(zip(several, LINES, strict=False))
    return {value: colormaps["viridis"](place / len(several)) for place, value in enumerate(several)}


def _curve(axes: Axes, fit: Fit, across_n: Array, columns: Columns, colour: Any, label: str = "") -> None:
    """The law along a line of points, with its band."""
    low, high = np.array([middle(losses) for losses in fit.drawn_losses(columns).T]).T
    axes.fill_between(across_n, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(across_n, fit.loss(columns), color=colour, linewidth=1.8, label=label)


def _over_tokens(axes: Axes, found: Findings) -> None:
    """Loss over D, a curve for each N."""
    predicted = [one.point for one in found.held_out]
    everyone = [*found.points, *predicted]
    colours = _colours([point.variables["N"] for point in everyone])
    tokens_n = _spread([point.variables["D"] for point in everyone], margin=1.3)
    for size, colour in colours.items():
        columns = {"N": np.full(STEPS, size), "D": tokens_n}
        _curve(axes, found.fit, tokens_n, columns, colour, f"N = {short_count(size)}")
    for point in found.points:
        axes.plot(
            point.variables["D"], point.loss, "o", color=colours[point.variables["N"]], markersize=6, zorder=3
        )
    for number, one in enumerate(found.held_out):
        tokens, colour = one.point.variables["D"], colours[one.point.variables["N"]]
        below, above = one.loss - one.interval[0], one.interval[1] - one.loss
        spread = [[max(0.0, below)], [max(0.0, above)]]
        axes.errorbar(tokens, one.loss, yerr=spread, color=colour, capsize=6, linewidth=1.5)
        label = "held out" if number == 0 else None
        axes.plot(
            *(tokens, one.point.loss, "*"), color=colour, markeredgecolor="black", markersize=15, zorder=4,
            linestyle="none", label=label,
        )  # fmt: skip
    axes.set_xscale("log")
    _ticks(axes, tokens_n[0], tokens_n[-1])
    axes.set_xlabel("D, tokens")
    axes.set_ylabel(f"loss {found.loss}, nats per token")
    axes.legend(fontsize=10)


def _over_sizes(axes: Axes, found: Findings) -> None:
    """Loss over N, a curve for each budget, and the best size on it."""
    assert found.cost is not None
    sizes = [point.variables["N"] for point in found.points]
    best = [one.size for one in found.optima if min(sizes) / 100 < one.size < 1e4 * max(sizes)]
    sizes_n = _spread([*sizes, *best], margin=3.0)
    cost_n = found.cost(sizes_n)
    shape = {name: np.full(STEPS, value) for name, value in found.shape.items()}
    axes.axvspan(min(sizes), max(sizes), color=LIGHT, alpha=0.25, linewidth=0)
    axes.text(min(sizes), 0.01, " sizes of the runs", transform=axes.get_xaxis_transform(), color=GREY)
    colours = _colours([one.flops for one in found.optima])
    among_runs_n = (min(sizes) <= sizes_n) & (sizes_n <= max(sizes))
    shown = []  # losses: far out a curve leaves the picture
    for one in found.optima:
        columns = {"N": sizes_n, "D": one.flops / cost_n, **shape}
        colour = colours[one.flops]
        _curve(axes, found.fit, sizes_n, columns, colour, f"{one.flops:.2g} FLOPs ({one.times_largest:.3g}x)")
        low, high = np.clip(one.size_interval, sizes_n[0], sizes_n[-1])
        axes.plot([low, high], [one.loss] * 2, "|-", color=colour, linewidth=1.2, markersize=9)
        axes.plot(one.size, one.loss, "D", color=colour, markeredgecolor="black", markersize=8, zorder=4)
        shown += [one.loss, *found.fit.loss(columns)[among_runs_n]]
    span = max(shown) - min(shown)
    axes.set_ylim(min(shown) - 0.2 * span, max(shown) + 0.3 * span)
    axes.set_xscale("log")
    axes.set_xlim(sizes_n[0], sizes_n[-1])
    _ticks(axes, sizes_n[0], sizes_n[-1])
    axes.set_xlabel(f"N, {found.counted}")
    axes.set_ylabel("loss by the law")
    axes.legend(fontsize=10, title="a budget (of the largest run's)", title_fontsize=10, loc="upper right")


def _off(axes: Axes, found: Findings) -> None:
    """How far each point lies from the law, by R."""
    predicted = [one.point for one in found.held_out]
    colours = _colours([point.variables["R"] for point in [*found.points, *predicted]])

    def scatter(points: list[Point], marker: str, size: int) -> None:
        fitted_n = found.fit.loss(columns_of(found.fit.law, points))
        for ratio, colour in colours.items():
            chosen = [k for k, point in enumerate(points) if point.variables["R"] == ratio]
            off = [100 * (points[k].loss / fitted_n[k] - 1) for k in chosen]
            label = f"R = {ratio:g}" if marker == "o" else None
            axes.plot(fitted_n[chosen], off, marker, color=colour, markersize=size, label=label)

    scatter(found.points, "o", 5)
    if predicted:
        scatter(predicted, "*", 14)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_xlabel("loss by the law, nats per token")
    axes.set_ylabel("found, % above the law")
    axes.legend(fontsize=10)


def _over_ratios(axes: Axes, found: Findings) -> None:
    """Loss over R for each P, at the middle of the points in N and D."""
    columns = columns_of(found.fit.law, found.points)
    size, tokens = (float(np.exp(np.log(columns[name]).mean())) for name in ("N", "D"))
    ratios_n = _spread(columns["R"].tolist(), margin=1.1)
    shares = [float(np.mean(group)) for group in groups(columns["P"].tolist())]
    for share, colour in _colours(shares).items():
        line = {"N": size, "D": tokens, "P": share}
        at = {name: np.full(STEPS, value) for name, value in line.items()} | {"R": ratios_n}
        _curve(axes, found.fit, ratios_n, at, colour, f"P = {share:.2g}")
    axes.set_xlabel("R, tokens per concept")
    axes.set_ylabel(f"loss by the law\nat N = {short_count(size)}, D = {short_count(tokens)}")
    axes.legend(fontsize=10)


def _spread(values: Sequence[float], margin: float) -> Array:
    """Evenly over the logarithms of a range, and by a factor beyond."""
    return np.geomspace(min(values) / margin, max(values) * margin, STEPS)


def _ticks(axes: Axes, low: float, high: float) -> None:
    """Counts such as 300k on a logarithmic axis, the fewer a decade the longer it is."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    steps = (1, 1.5, 2, 3, 5, 7) if high < 20 * low else (1, 3) if len(decades) <= 5 else (1,)
    axes.xaxis.set_major_locator(FixedLocator([step * 10.0**decade for decade in decades for step in steps]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value).replace(".0", "")))
    axes.set_xlim(low, high)
