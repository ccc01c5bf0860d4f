"""Pictures: a plan's memory per pipeline stage and time per stage of the schedule; a dry run's live bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.config.colours import BLUE, GREEN, GREY, LIGHT, ORANGE, PURPLE, SKY, VERMILION, YELLOW
from llada_megatron.config.quantities import GB
from llada_megatron.plan.estimate import Plan
from llada_megatron.plan.exact import RankComparison
from llada_megatron.plan.planner import Planner
from llada_megatron.plan.report import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    "launches": GREY,
    "boundaries": LIGHT,  # of a family without pipelines
}


def draw(plan: Plan, path: Path) -> None:
    """Write a PNG of a plan."""
    height = 2.4 + 0.32 * max(len(plan.ranks), len(plan.stages))
    figure, (memory, time) = _panels(height, 1, 2)
    _memory(memory, plan)
    _time(time, plan)
    verdict = "fits" if plan.fits else "does not fit"
    figure.suptitle(f"{plan.name} {verdict} on {plan.cluster} ({plan.gpus} GPUs)", x=0.01, ha="left")
    _save(figure, path)


def draw_exact(planner: Planner, found: list[RankComparison], path: Path) -> None:
    """Write a PNG of a dry run: live bytes of each pipeline stage through its step."""
    figure, panels = _panels(1.4 + 1.5 * len(found), len(found), 1)
    top = max(planner.usable_bytes, *(max(one.peak, one.report["peak"]) for one in found)) * 1.05 / GB
    for one, axes in zip(found, panels, strict=True):
        live = [size / GB for size in one.report["over_time"]]
        through = [place / max(1, len(live) - 1) for place in range(len(live))]
        axes.fill_between(through, live, color=SKY, linewidth=0)
        axes.axhline(one.report["peak"] / GB, color=BLUE, linewidth=1, label="peak")
        axes.axhline(one.peak / GB, color=VERMILION, linewidth=1, linestyle=":", label="closed form")
        axes.axhline(planner.usable_bytes / GB, color=GREY, linewidth=1, linestyle="--", label="usable")
        axes.set_ylabel(f"stage {one.rank}, GB")
        axes.set(xlim=(0, 1), ylim=(0, top))
        axes.set_xticks([])
    panels[-1].set_xlabel("a step, from the first forward to the update; each allocation counts alike")
    panels[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    figure.suptitle(f"{planner.config.run.name}: live bytes of the dry run", x=0.01, ha="left")
    _save(figure, path)


def _panels(height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, height), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


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
