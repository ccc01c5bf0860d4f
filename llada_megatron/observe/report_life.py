"""How a run goes: where it is, what was planned and measured, what it cost, what happened to it."""

from __future__ import annotations

import json
import time
from typing import Any

from llada_megatron.config.layout import data_parallel_size
from llada_megatron.config.quantities import amount, duration, short_count, short_hours, short_time
from llada_megatron.observe.parts import NOT_YET, Facts, Paragraph, Part, Progress, Table
from llada_megatron.observe.run import HOUR_SEC, Figures, Run
from llada_megatron.plan.search import describe
from llada_megatron.record.events import Event

EVENTS = 20
"""So many are shown, the newest."""
LONGEST = 300
"""Characters of an event that are shown."""


def overview(run: Run, figures: Figures) -> list[Part]:
    """Where the run is, and what it trains."""
    now, model = figures["progress"], run.config.model
    experts = f"{model.experts}, {model.experts_per_token} per token" if model.experts else "none"
    speed, wall = now["tokens_per_sec"], figures["wall_sec"]
    rows = [
        ("state", now["state"]),
        ("stage", f"{now['stage']}, block {now['block_size']}"),
        ("step", f"{now['step']} of {now['steps']}"),
        ("tokens", f"{short_count(now['tokens'])} of {short_count(now['total_tokens'])}"),
        ("speed", f"{short_count(speed)} tokens/s" if speed else NOT_YET),
        ("skipped steps", str(now["skipped_steps"])),
        ("wall time", NOT_YET if wall is None else duration(wall / HOUR_SEC)),
        ("layers", f"{model.layers} of width {model.hidden_size}"),
        ("experts", experts),
        ("sequence", f"{run.schedule.stage_at(now['step']).sequence_length} tokens"),
    ]
    if now["rollbacks"]:
        rows.append(("went back", "; ".join(map(_went_back, now["rollbacks"]))))
    return [
        Progress(now["tokens"] / max(1, now["total_tokens"]), _in_a_sentence(now)),
        Facts(rows),
        *(Paragraph(f"Last event, {_when(event)}: {_said(event)}.") for event in run.events[-1:]),
    ]


def _went_back(rollback: Figures) -> str:
    first, last = rollback["samples"]
    return f"at step {rollback['step']} to step {rollback['to']}, past samples {first} to {last}"


def _in_a_sentence(now: Figures) -> str:
    if now["complete"]:
        return "The schedule is complete."
    sentence = f"The schedule is not complete: {now['tokens'] / max(1, now['total_tokens']):.1%}"
    if now["remaining_sec"] is not None:
        sentence += f", about {duration(now['remaining_sec'] / HOUR_SEC)} left at the speed of the last steps"
    return sentence + (f". {now['state'].capitalize()}: {now['why']}." if now["why"] else ".")


def layout(run: Run, figures: Figures) -> list[Part]:
    """How the run is split, and the plan beside the measurement."""
    config, memory = run.config, figures["plan"]["memory"]
    rows = [
        ("cluster", config.cluster.name),
        ("processes", str(config.layout.processes)),
        ("layout", describe(config.layout)),
        ("data parallel", str(data_parallel_size(config.layout))),
        ("global batch", f"{run.schedule.stage_at(figures['progress']['step']).global_batch} sequences"),
        ("numbers", config.precision.dtype.value),
        ("memory, planned", _bytes(memory["planned_bytes"], memory["usable_bytes"])),
        ("memory, measured", _bytes(memory["measured_bytes"])),
    ]
    table = []
    for stage in figures["plan"]["stages"]:
        of = [stage["planned"] or {}, stage["measured"] or {}]
        cells = [_cell(each.get(name), form) for name, form in SHOWN.values() for each in of]
        table.append([stage["name"], *cells])
    header = ["stage", *(f"{name}, {kind}" for name in SHOWN for kind in ("planned", "measured"))]
    parts: list[Part] = [Facts(rows)]
    if refused := figures["plan"]["refused"]:
        parts.append(Paragraph(f"There is no plan of this run: {refused}"))
    text = (
        "Planned: what `llada plan` says. Measured: the median over a stage's steps, and rank 0's peak of"
        " memory, on a CPU with everything else that its process holds."
    )
    return [*parts, Paragraph(text), Table(header, table)]


SHOWN = {"step": ("step_sec", "{:.3g} s".format), "MFU": ("mfu", "{:.1%}".format)}
"""Figures of a stage's speed: what a table calls them, and how it shows them."""


def _cell(value: float | None, form: Any) -> str:
    return "-" if value is None else form(value)


def _bytes(size: int | None, of: int | None = None) -> str:
    if size is None:
        return "unknown"
    return amount(size) + (f" of {amount(of)}" if of else "")


def cost(figures: Figures) -> list[Part]:
    """What the run took, and from whom."""
    spent = figures["cost"]
    rows = [("device-hours", short_hours(spent["device_hours"]))]
    if spent["goodput"] is not None:
        rows.append(("goodput", f"{spent['goodput']:.1%}"))
    if spent["money"] is not None:
        price = f"at {spent['price_per_device_hour']:g} per device-hour"
        rows.append(("money", f"{spent['money']:,.2f} {price}"))
    uses = [
        [name, short_hours(hours), f"{hours / spent['device_hours']:.1%}" if spent["device_hours"] else "-"]
        for name, hours in spent["by_use"].items()
    ]
    parts: list[Part] = [Facts(rows), Table(["spent on", "device-hours", "share"], uses)]
    if not spent["attempts"]:
        text = "Steps alone: the rest is known of runs that were submitted or supervised."
        return [Paragraph(text), *parts]
    attempts = [
        [
            str(number),
            str(each["devices"]),
            *(short_time(each[name]) for name in ("queue_sec", "useful_sec", "sec")),
            each["outcome"],
        ]
        for number, each in enumerate(spent["attempts"])
    ]
    header = ["attempt", "devices", "in the queue", "in useful steps", "in all", "ended"]
    return [*parts, Table(header, attempts)]


def happened(record: list[Event]) -> list[Part]:
    """The newest events, the newest first."""
    if not record:
        return [Paragraph(f"{NOT_YET.capitalize()}.")]
    rows = [[_when(event), _said(event)] for event in reversed(record[-EVENTS:])]
    more = len(record) - len(rows)
    said = [Paragraph(f"The newest {EVENTS}; {more} came before.")] if more > 0 else []
    return [*said, Table(["time", "event"], rows)]


def _when(event: Event) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(event["time"]))


def _said(event: Event) -> str:
    """An event with all its fields, as a line."""
    fields = ((name, value) for name, value in event.items() if name not in ("event", "time"))
    said = ", ".join(f"{name} {_value(value)}" for name, value in fields)
    text = event["event"].replace("_", " ") + (f": {said}" if said else "")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
