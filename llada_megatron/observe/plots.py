"""The pictures of a report, as PNG files.

Colours are config/colours.py's; sequences in time use viridis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llada_megatron.config.colours import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from llada_megatron.config.objectives import Figure as ObjectiveFigure
from llada_megatron.observe.frontier import Point, counted, in_order
from llada_megatron.record.metrics import Record, by_stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (VERMILION, "D"), (PURPLE, "v"), (SKY, "P")]
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
}


def plot_loss(steps: list[Record], path: Path) -> None:
    """Draw the training loss over a panel with the learning rate, the stages shaded."""
    with _picture(path, height=5.2) as figure:
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        _shade_stages(loss, steps, labels=True)
        _shade_stages(rate, steps, labels=False)
        loss.plot(_column(steps, "step"), _column(steps, "loss"), color=SKY, linewidth=0.8, alpha=0.6)
        for _, records in by_stage(steps):
            loss.plot(
                _column(records, "step"), _running_mean(_column(records, "loss")), color=BLUE, linewidth=2
            )
        loss.set_ylabel("training loss")
        rate.plot(_column(steps, "step"), _column(steps, "lr"), color=GREY)
        rate.set_ylim(bottom=0)
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        rate.set_ylabel("learning rate")
        rate.set_xlabel("step")


def plot_bound(evaluations: list[Record], ar_nll: float | None, baselines: Record | None, path: Path) -> None:
    """Draw the likelihood bound by stage, one line per block size, against the AR model and n-gram entropies.

    `evaluations` holds one record per stage; `baselines` has `unigram` and `bigram`; all in nats per token.
    """
    block_sizes = sorted({int(size) for record in evaluations for size in record["bound"]})
    references = {"AR": ar_nll, **(baselines or {})}
    x = np.arange(len(evaluations))
    with _picture(path, height=4.6) as figure:
        axes = figure.subplots()
        ends: list[tuple[float, str, str]] = []  # value, text, colour
        for index, size in enumerate(block_sizes):
            color, marker = LINES[index % len(LINES)]
            bounds = [record["bound"].get(str(size), {}) for record in evaluations]
            mean, error = _column(bounds, "mean"), _column(bounds, "se")
            axes.errorbar(x, mean, error, color=color, marker=marker, markersize=5, capsize=3, linewidth=1.8)
            ends += [(value, f"block {size}: {value:.2f}", color) for value in mean[np.isfinite(mean)][-1:]]
        for name, value in references.items():
            if value is not None:
                axes.axhline(value, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
                ends.append((value, f"{name}: {value:.2f}", GREY))
        _label_right(axes, ends)
        names = [f"{record['stage']}\n(block {record['block_size']})" for record in evaluations]
        crowded = len(names) > 6
        axes.set_xticks(
            x, names, rotation=35 if crowded else 0, ha="right" if crowded else "center", fontsize=9
        )
        axes.set_ylabel("nats per token")
        axes.set_xlabel("stage, evaluated at its end")


def plot_figure(steps: list[Record], name: str, figure_of: ObjectiveFigure, path: Path) -> None:
    """Draw an objective's figure over its bins, from the last quarter of each stage that has it.

    A run with one such stage shows its first, middle and last third instead.
    """
    from matplotlib import colormaps

    parts = by_stage(record for record in steps if record.get(name) is not None)
    if len(parts) == 1:
        thirds = np.array_split(np.array(parts[0][1], dtype=object), 3)
        names = ("first third", "middle third", "last third")
        parts = [(third, list(steps)) for third, steps in zip(names, thirds, strict=True) if len(steps)]
    else:
        parts = [
            (f"{stage} (block {part[-1]['block_size']})", part[-(len(part) // 4 + 1) :])
            for stage, part in parts
        ]
    with _picture(path, height=4.2) as figure:
        axes = figure.subplots()
        colors = colormaps["viridis"](np.linspace(0, 0.9, len(parts)))
        for (label, part), color in zip(parts, colors, strict=True):
            means = _mean_of_finite(np.array([record[name] for record in part], dtype=float))
            centres = (np.arange(len(means)) + 0.5) / len(means)
            axes.plot(centres, means, color=color, marker="o", markersize=4, label=label)
        axes.set_xlim(0, 1)
        axes.set_xlabel(figure_of.label)
        axes.set_ylabel(figure_of.unit)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9.5, title="early to late")


def plot_frontier(lines: Sequence[tuple[str, Sequence[Point]]], metric: str, path: Path) -> None:
    """Draw accuracy over tokens per forward, one labelled line per model and rule, with standard errors.

    Points that AUP leaves out are hollow.
    """
    with _picture(path, height=3.8 + 0.22 * len(lines)) as figure:  # a legend of any length leaves room
        axes = figure.subplots()
        for index, (label, points) in enumerate(lines):
            color, _ = LINES[index % len(LINES)]
            _, marker = LINES[(index + index // len(LINES)) % len(LINES)]  # no two lines have both alike
            ordered = in_order(points)
            left_out = {*ordered} - {*counted(ordered)}
            axes.errorbar(
                [point.tokens_per_forward for point in ordered],
                [point.accuracy for point in ordered],
                [point.error or 0.0 for point in ordered],
                color=color,
                linestyle=("-", "--", ":")[index // len(LINES) % 3],
                linewidth=1.8,
                capsize=3,
            )
            for point in ordered:
                axes.plot(
                    point.tokens_per_forward,
                    point.accuracy,
                    color=color,
                    marker=marker,
                    markersize=6,
                    markerfacecolor="white" if point in left_out else color,
                    linestyle="none",
                    label=label if point is ordered[0] else None,
                )
        axes.set_xlabel("tokens per forward")
        axes.set_ylabel(f"{metric}, %")
        figure.legend(loc="outside lower left", fontsize=9.5)


def plot_expert_load(steps: list[Record], path: Path) -> None:
    """Draw the load of the busiest expert, and of the process whose experts got most rows, over the mean."""
    with _picture(path, height=3.4) as figure:
        axes = figure.subplots()
        _shade_stages(axes, steps, labels=True)
        for name, color, label in (
            ("load_max_over_mean", GREEN, "an expert's, of a step"),
            ("expert_rows_max_over_mean", PURPLE, "a process's, of a micro-batch"),
        ):
            values = _column(steps, name)
            if np.isfinite(values).any():
                axes.plot(_column(steps, "step"), values, color=color, linewidth=1.2, label=label)
        axes.legend(loc="upper right", fontsize=9.5)
        axes.axhline(1, color=GREY, linestyle="--", linewidth=1.2)
        axes.set_ylim(bottom=0.9)
        _label_right(axes, [(1.0, "balanced", GREY)])
        axes.set_ylabel("expert load, max / mean")
        axes.set_xlabel("step")


BY_LAYER = {
    "grad_norm_by_layer": "gradient norm",
    "weight_norm_by_layer": "weight norm",
    "activation_rms_by_layer": "activations, RMS",
    "router_entropy_by_layer": "router's entropy, nats",
    "router_z_by_layer": "router's z",
    "dead_experts_by_layer": "dead experts",
}
"""Figures of a watched step that have one number for each part of the model, and what they are called."""
IN_POWERS = ("grad_norm_by_layer", "activation_rms_by_layer")
MOST_COLUMNS = 400


def plot_layers(watched: list[Record], path: Path) -> None:
    """Draw each figure of BY_LAYER as a map of layers over the watched steps; dense models have fewer."""
    chosen = np.unique(np.linspace(0, len(watched) - 1, MOST_COLUMNS).round().astype(int))
    records = [watched[index] for index in chosen]
    steps = _column(records, "step")
    gap = float(np.diff(steps).min()) if len(steps) > 1 else 1.0
    edges = np.concatenate([steps - gap / 2, [steps[-1] + gap / 2]])
    maps = {}
    for name, title in BY_LAYER.items():
        values = np.array([record[name] for record in records], dtype=float).T
        if name in IN_POWERS:
            values, title = np.log10(np.where(values > 0, values, np.nan)), f"{title}, log10"
        if np.isfinite(values).any():
            maps[title] = values
    rows = -(-len(maps) // 2)
    with _picture(path, height=2.8 * rows) as figure:
        panels = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False)
        for axes in panels.flat[len(maps) :]:
            axes.set_axis_off()
        for axes, (title, values) in zip(panels.flat, maps.items(), strict=False):
            axes.grid(False)
            axes.set_title(title, loc="left", fontsize=10.5)
            layers = np.arange(len(values) + 1) - 0.5
            figure.colorbar(axes.pcolormesh(edges, layers, values, cmap="viridis"), ax=axes)
        for axes in panels[:, 0]:
            axes.set_ylabel("layer")
        for axes in panels[-1]:
            axes.set_xlabel("step")


@contextmanager
def _picture(path: Path, height: float) -> Iterator[Figure]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(9, height), layout="constrained")
        yield figure
        figure.savefig(path, dpi=120, format="png")


def _shade_stages(axes: Axes, steps: list[Record], labels: bool) -> None:
    """Shade every other stage and write the block sizes above, moved apart where stages are short."""
    stages = by_stage(steps)
    first, last = steps[0]["step"] - 0.5, steps[-1]["step"] + 0.5
    axes.set_xlim(first, last)
    edges = [records[0]["step"] - 0.5 for _, records in stages] + [last]
    for left, right in list(pairwise(edges))[::2]:
        axes.axvspan(left, right, color="#f1f1f1", linewidth=0, zorder=0)
    if not labels:
        return
    centres = (np.array(edges[:-1]) + np.array(edges[1:])) / 2
    centres = (centres - first) / (last - first)
    for centre, place, (_, records) in zip(centres, _spread(centres, 0.05), stages, strict=True):
        label = "AR" if records[0]["objective"] == "autoregressive" else str(records[0]["block_size"])
        axes.annotate(
            label,
            xy=(centre, 1),
            xytext=(place, 1.07),
            xycoords="axes fraction",
            ha="center",
            fontsize=9.5,
            arrowprops={
                "arrowstyle": "-",
                "color": "#bbbbbb",
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (0.5, 0),
            },
        )
    axes.set_title("block size of the stage", loc="left", fontsize=9.5, color=GREY, pad=24)


def _label_right(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write (value, text, colour) labels right of the axes, moved apart where values are close."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    heights = np.array([(value - low) / (high - low) for value, _, _ in ends])
    for height, place, (_, text, color) in zip(heights, _spread(heights, 0.06), ends, strict=True):
        axes.annotate(
            text,
            xy=(1, height),
            xytext=(1.04, place),
            xycoords="axes fraction",
            va="center",
            color=color,
            fontsize=10,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": "#bbbbbb",
                "shrinkA": 2,
                "shrinkB": 1,
                "relpos": (0, 0.5),
            },
        )


def _spread(places: np.ndarray, gap: float) -> np.ndarray:
    """`places` in [0, 1] moved apart until neighbours are `gap` away, their order kept."""
    order = np.argsort(places, kind="stable")
    gap = min(gap, 1 / max(1, len(places) - 1))
    offsets = gap * np.arange(len(places))
    slack = places[order] - offsets  # neighbours are far enough apart where this does not fall
    upwards = np.maximum.accumulate(slack)
    downwards = np.minimum.accumulate(slack[::-1])[::-1]
    result = np.empty_like(slack)
    result[order] = np.clip((upwards + downwards) / 2, 0, 1 - offsets[-1]) + offsets
    return result


def _column(records: list[Record], key: str) -> np.ndarray:
    """The values of `key` as float64, NaN where a record has none."""
    return np.array([record.get(key) for record in records], dtype=float)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the finite values of a window centred on each value, of a thirtieth of the length."""
    reach = max(1, len(values) // 60)
    finite = np.isfinite(values)
    total = np.concatenate([[0], np.cumsum(np.where(finite, values, 0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    left = np.maximum(np.arange(len(values)) - reach, 0)
    right = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    window = count[right] - count[left]
    return np.where(window > 0, (total[right] - total[left]) / np.maximum(window, 1), np.nan)


def _mean_of_finite(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaNs, NaN where there is nothing else."""
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    return np.where(count > 0, np.where(finite, values, 0).sum(axis=0) / np.maximum(count, 1), np.nan)
