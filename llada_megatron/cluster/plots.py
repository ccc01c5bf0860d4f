"""A plan as a picture: memory of every pipeline stage, and where the time of the schedule's stages goes.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.cluster.plan import Plan
from llada_megatron.cluster.report import KINDS
from llada_megatron.cluster.topology import GB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY, LIGHT = "#CC79A7", "#56B4E9", "#F0E442", "#666666", "#bbbbbb"
MEMORY = {
    "weights": BLUE,
    "gradients": SKY,
    "optimizer": GREEN,
    "kept by attention": ORANGE,
    "kept by MLP and experts": VERMILION,
    "other kept": YELLOW,
    "transient": PURPLE,
}
ATTENTION, MLP = ("attention", "core_attn"), ("mlp", "shared_experts", "experts", "router")
TIME = {
    "gemm": BLUE,
    "expert gemm": SKY,
    "attention": GREEN,
    "memory": YELLOW,
    "messages": ORANGE,
    "gradients": VERMILION,
    "optimizer": PURPLE,
    "bubble": LIGHT,
}


def draw(plan: Plan, path: Path) -> None:
    """Write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 2.4 + 0.32 * max(len(plan.ranks), len(plan.stages))
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (memory, time) = pyplot.subplots(1, 2, figsize=(13, height), layout="constrained")
        _memory(memory, plan)
        _time(time, plan)
        verdict = "fits" if plan.fits else "does not fit"
        figure.suptitle(f"{plan.name} {verdict} on {plan.cluster} ({plan.gpus} GPUs)", x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def _memory(axes: Axes, plan: Plan) -> None:
    rows = []
    for rank in plan.ranks:
        kept, parts = rank.activations, rank.parts
        attention = sum(kept.get(name, 0) for name in ATTENTION)
        mlp = sum(kept.get(name, 0) for name in MLP)
        sizes = (
            *(parts["weights"], parts["gradients"], parts["optimizer"], attention, mlp),
            *(parts["activations"] - attention - mlp, parts["transient"]),
        )
        rows.append([size / GB for size in sizes])
    _stack(axes, rows, [str(rank.rank) for rank in plan.ranks], MEMORY)
    for limit, label, style in ((plan.usable_bytes, "usable", "--"), (plan.memory_bytes, "device", "-")):
        axes.axvline(limit / GB, color=GREY, linestyle=style, linewidth=1)
        axes.text(limit / GB, 1.01, label, transform=axes.get_xaxis_transform(), ha="center", color=GREY)
    axes.set_xlabel("GB on the fullest process")
    axes.set_ylabel("pipeline stage")


def _time(axes: Axes, plan: Plan) -> None:
    rows = []
    for stage in plan.stages:
        parts = dict.fromkeys(TIME, 0.0)
        for name, seconds in stage.seconds.items():
            parts[name if name in parts else "messages"] += seconds
        rows.append(list(parts.values()))
    labels = {KINDS.get(name, "other messages"): colour for name, colour in TIME.items()}
    _stack(axes, rows, [stage.name for stage in plan.stages], labels)
    axes.set_xlabel("seconds per step, estimated")


def _stack(axes: Axes, rows: list[list[float]], names: list[str], colours: dict[str, str]) -> None:
    """Horizontal bars from top to bottom, their parts side by side."""
    places = range(len(rows))
    start = [0.0] * len(rows)
    for part, (label, colour) in enumerate(colours.items()):
        widths = [row[part] for row in rows]
        if any(widths):
            axes.barh(places, widths, left=start, color=colour, label=label, height=0.7)
        start = [left + width for left, width in zip(start, widths, strict=True)]
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False, fontsize=9)
