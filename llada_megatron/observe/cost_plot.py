"""The account of a run as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from llada_megatron.config.colours import BLUE, VERMILION
from llada_megatron.config.quantities import short_hours
from llada_megatron.jobs.account import Cost
from llada_megatron.jobs.cost_report import by_use
from llada_megatron.observe.plots import STYLE


def draw(cost: Cost, path: Path) -> None:
    """Write a PNG: device-hours by stage and by loss."""
    uses = by_use(cost)
    colours = [BLUE if name in cost.useful_hours else VERMILION for name in uses]
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(9, 1.4 + 0.36 * len(uses)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(list(uses), list(uses.values()), color=colours, height=0.7)
        axes.bar_label(
            bars,
            [f"{short_hours(hours)} ({hours / cost.device_hours:.1%})" for hours in uses.values()],
            padding=4,
        )
        axes.margins(x=0.22)  # room for the labels
        axes.invert_yaxis()
        axes.set_xlabel("device-hours")
        axes.set_title(
            f"{short_hours(cost.device_hours)} device-hours, goodput {cost.goodput:.1%}"
            f" in {len(cost.attempts)} attempt{'s' * (len(cost.attempts) > 1)}",
            loc="left",
        )
        figure.savefig(path, dpi=120, format="png")
