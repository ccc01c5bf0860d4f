"""The account of a run for people: Markdown that is also legible in a terminal."""

from __future__ import annotations

from llada_megatron.config.quantities import short_hours, short_time
from llada_megatron.jobs.account import HOUR_SEC, LOSSES, Cost

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
        device_hours = short_hours(each.allocated_sec * each.devices / HOUR_SEC)
        attempts.append(
            (str(each.number), str(each.devices), *map(short_time, seconds), device_hours, each.outcome)
        )
    uses: list[tuple[str, ...]] = [("spent on", "device-hours", "share", "in attempt")]
    for name, hours in by_use(cost).items():
        share = f"{hours / cost.device_hours:.1%}" if cost.device_hours else "-"
        uses.append((name, short_hours(hours), share, _by_attempt(cost, name)))
    uses.append(("all", short_hours(cost.device_hours), "", ""))
    lines = [*_table(attempts), "", *_table(uses), ""]
    lines.append(f"Goodput {cost.goodput:.1%}: steps that are part of the run, of all device-hours")
    if cost.device_hours:
        lines.append(f"{cost.tokens:,} tokens, {cost.tokens / cost.device_hours:,.0f} per device-hour")
    if price:
        lines.append(f"Cost {price * cost.device_hours:,.2f} at {price:g} per device-hour")
    return "\n".join(lines) + "\n"


def by_use(cost: Cost) -> dict[str, float]:
    """Device-hours: stages in their order, then losses."""
    return {**cost.useful_hours, **{name: cost.lost_hours.get(name, 0.0) for name in LOSSES}}


def _by_attempt(cost: Cost, stage: str) -> str:
    """Device-hours of a stage by attempt; nothing for a loss, which the table of attempts has."""
    return ", ".join(
        f"{each.number}: {short_hours(each.useful_sec[stage] * each.devices / HOUR_SEC)}"
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
