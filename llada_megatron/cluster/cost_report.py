"""The account of a run for people: Markdown that is also legible in a terminal, and a picture."""

from __future__ import annotations

from pathlib import Path

from llada_megatron.cluster.cost import HOUR_SEC, LOSSES, Cost

USEFUL, LOST = "#0072B2", "#D55E00"  # Okabe and Ito, which colour-blind readers can tell apart
WORDS = ("spent on", "in attempt", "ended")
"""Columns that are aligned to the left."""


def markdown(cost: Cost, price: float) -> str:
    """Time by attempt, device-hours by stage (and attempt) and by loss, and the figures under them."""
    attempts: list[tuple[str, ...]] = [
        ("attempt", "devices", "queue", "useful", *LOSSES, "device-hours", "ended")
    ]
    for each in cost.attempts:
        seconds = [
            each.queue_sec,
            sum(each.useful_sec.values()),
            *(each.lost_sec.get(n, 0.0) for n in LOSSES),
        ]
        device_hours = _hours(each.allocated_sec * each.devices / HOUR_SEC)
        attempts.append(
            (str(each.number), str(each.devices), *map(_time, seconds), device_hours, each.outcome)
        )
    uses: list[tuple[str, ...]] = [("spent on", "device-hours", "share", "in attempt")]
    for name, hours in _by_use(cost).items():
        share = f"{hours / cost.device_hours:.1%}" if cost.device_hours else "-"
        uses.append((name, _hours(hours), share, _by_attempt(cost, name)))
    uses.append(("all", _hours(cost.device_hours), "", ""))
    lines = [*_table(attempts), "", *_table(uses), ""]
    lines.append(f"Goodput {cost.goodput:.1%}: steps that are part of the run, of all device-hours")
    if cost.device_hours:
        lines.append(f"{cost.tokens:,} tokens, {cost.tokens / cost.device_hours:,.0f} per device-hour")
    if price:
        lines.append(f"Cost {price * cost.device_hours:,.2f} at {price:g} per device-hour")
    return "\n".join(lines) + "\n"


def draw(cost: Cost, path: Path) -> None:
    """Write a PNG: device-hours by stage and by loss."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from llada_megatron.observe.plots import STYLE

    uses = _by_use(cost)
    colours = [USEFUL if name in cost.useful_hours else LOST for name in uses]
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(9, 1.4 + 0.36 * len(uses)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(list(uses), list(uses.values()), color=colours, height=0.7)
        axes.bar_label(
            bars, [f"{_hours(hours)} ({hours / cost.device_hours:.1%})" for hours in uses.values()], padding=4
        )
        axes.margins(x=0.22)  # room for the labels
        axes.invert_yaxis()
        axes.set_xlabel("device-hours")
        axes.set_title(
            f"{_hours(cost.device_hours)} device-hours, goodput {cost.goodput:.1%}"
            f" in {len(cost.attempts)} attempt{'s' * (len(cost.attempts) > 1)}",
            loc="left",
        )
        figure.savefig(path, dpi=120, format="png")


def _by_use(cost: Cost) -> dict[str, float]:
    """Device-hours: stages in their order, then losses."""
    return {**cost.useful_hours, **{name: cost.lost_hours.get(name, 0.0) for name in LOSSES}}


def _by_attempt(cost: Cost, stage: str) -> str:
    """Device-hours of a stage by attempt; nothing for a loss, which the table of attempts has."""
    return ", ".join(
        f"{each.number}: {_hours(each.useful_sec[stage] * each.devices / HOUR_SEC)}"
        for each in cost.attempts
        if stage in each.useful_sec
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table whose columns are as wide as their widest cell; figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = ["<" if header in WORDS else ">" for header in rows[0]]
    lines = []
    for row in rows:
        cells = [f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    rules = ["-" * (width + 1) + ("-" if s == "<" else ":") for s, width in zip(signs, widths, strict=True)]
    lines.insert(1, f"|{'|'.join(rules)}|")
    return lines


def _time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36_000 else f"{seconds / HOUR_SEC:.1f} h"


def _hours(hours: float) -> str:
    """Whole from 100 on; small ones to a third of a second."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2f}" if hours >= 1 else f"{hours:.4f}"
