"""The verb `llada cost`: where the time of a run went, attempt by attempt, and what it cost."""

from __future__ import annotations

import argparse
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from llada_megatron.config.compose import load
from llada_megatron.observe import events
from llada_megatron.observe.events import Event
from llada_megatron.observe.metrics import read_jsonl, step_seconds

EXAMPLE = "llada cost runs/llada2_flash --price 2.5"
LOSSES = ("queue", "start-up", "replayed steps", "checkpoints", "evaluation", "other")
HOUR_SEC = 3600


@dataclass
class Attempt:
    """Seconds of one attempt, by what they went to; the queue before it holds no devices."""

    number: int
    devices: int
    seconds: dict[str, float]
    allocated_sec: float
    """From its start to its end, on every device."""
    outcome: str


@dataclass
class Cost:
    """What a run has taken so far."""

    attempts: list[Attempt]
    useful_sec: dict[str, float] = field(default_factory=dict)
    """Seconds of steps that are part of the run, by stage; replayed ones count once."""
    tokens: int = 0

    @property
    def device_hours(self) -> float:
        return sum(a.allocated_sec * a.devices for a in self.attempts) / HOUR_SEC

    @property
    def goodput(self) -> float:
        """Useful seconds over allocated ones, 0 to 1."""
        allocated = sum(attempt.allocated_sec for attempt in self.attempts)
        return sum(self.useful_sec.values()) / allocated if allocated else 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument(
        "--price", type=float, metavar="P", help="per device and hour; default: the cluster's"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw where the time went")


def run(args: argparse.Namespace) -> int:
    """Print the account of a run: 0; ValueError for a run without a record."""
    record = events.read(args.run)
    if not any(event["event"] == "started" for event in record):
        raise ValueError(f"{args.run} has no record of attempts: it was neither submitted nor supervised.")
    config = load(args.run / "config.yaml")
    result = account(args.run, record)
    price = config.cluster.price_per_gpu_hour if args.price is None else args.price
    text = markdown(result, price)
    print(text, end="")
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    if args.plot:
        _draw(result, args.plot)
    return 0


def account(run_dir: Path, record: list[Event], now: float | None = None) -> Cost:
    """The account of a run from its record; of a running attempt up to `now`, seconds since 1970."""
    steps = read_jsonl(run_dir / "metrics.jsonl")
    step_sec = [step_seconds(step) for step in steps]
    useful: dict[str, float] = defaultdict(float)
    for step, seconds in zip(steps, step_sec, strict=True):
        useful[step["stage"]] += seconds
    in_slurm = _sacct_by_start(events.last(record, "submitted"))
    starts = [index for index, event in enumerate(record) if event["event"] == "started"]
    attempts = []
    for number, (begin, after) in enumerate(zip(starts, [*starts[1:], len(record)], strict=True)):
        before, part, later = record[:begin], record[begin:after], record[after:]
        waited_since = events.last(before, "submitted", "ended")
        again = next((event for event in later if event["event"] == "first_step"), None)
        known = in_slurm.get(str(part[0].get("restart", number)))
        attempts.append(_attempt(number, part, waited_since, again, step_sec, known, now or time.time()))
    return Cost(attempts, dict(useful), steps[-1]["consumed_tokens"] if steps else 0)


def _attempt(
    number: int,
    part: list[Event],
    waited_since: Event | None,
    again: Event | None,
    step_sec: list[float],
    in_slurm: tuple[float, float, float] | None,
    now: float,
) -> Attempt:
    """One attempt's share. `again` is the next first step, before which its steps count as useful."""
    started, ended = part[0], events.last(part, "ended")
    begin, end = started["time"], ended["time"] if ended else now
    queued_at = waited_since["time"] if waited_since else begin
    if in_slurm is not None:
        queued_at, begin, end = in_slurm
    first = next((event for event in part if event["event"] == "first_step"), None)
    own_sec = step_sec[first["step"] : again["step"] if again else len(step_sec)] if first else []
    mean_sec = sum(step_sec) / len(step_sec) if step_sec else 0.0
    seconds = {
        "start-up": max(0.0, first["time"] - mean_sec - begin) if first else end - begin,
        "replayed steps": again["replayed"] * mean_sec if first and again else 0.0,
        "checkpoints": sum(event["seconds"] for event in part if event["event"] == "saved"),
        "evaluation": sum(event["seconds"] for event in part if event["event"] == "evaluated"),
    }
    seconds["other"] = max(0.0, end - begin - sum(own_sec) - sum(seconds.values()))
    seconds["queue"] = begin - queued_at
    return Attempt(
        number, started.get("devices", 1), seconds, end - begin, ended["outcome"] if ended else "running"
    )


def _sacct_by_start(submitted: Event | None) -> dict[str, tuple[float, float, float]]:
    """(submitted, started, ended) of each restart of a job by Slurm's accounting; empty where it has none."""
    if submitted is None:
        return {}
    columns = "--format=Submit,Start,End,State"
    command = ["sacct", "--allocations", "--duplicates", "--noheader", "--parsable2", columns]
    try:
        done = subprocess.run(
            [*command, f"--jobs={submitted['job']}"], capture_output=True, text=True, timeout=30
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}
    return parse_sacct(done.stdout) if done.returncode == 0 else {}


def parse_sacct(text: str) -> dict[str, tuple[float, float, float]]:
    """Lines `Submit|Start|End|State`, oldest first; those that have not ended are left out."""
    found = {}
    for restart, line in enumerate(line for line in text.splitlines() if line.count("|") == 3):
        try:
            times = [datetime.fromisoformat(cell).timestamp() for cell in line.split("|")[:3]]
        except ValueError:  # Unknown
            continue
        found[str(restart)] = (times[0], times[1], times[2])
    return found


def markdown(cost: Cost, price: float) -> str:
    """Both tables and the figures under them."""
    lines = [
        f"| attempt | devices | hours | {' | '.join(LOSSES)} | ended |",
        "|---" * (len(LOSSES) + 4) + "|",
    ]
    for attempt in cost.attempts:
        parts = " | ".join(_time(attempt.seconds.get(name, 0.0)) for name in LOSSES)
        lines.append(
            f"| {attempt.number} | {attempt.devices} | {attempt.allocated_sec / HOUR_SEC:.2f} | {parts}"
            f" | {attempt.outcome} |"
        )
    lines += ["", "| stage | useful |", "|---|---|"]
    lines += [f"| {stage} | {_time(seconds)} |" for stage, seconds in cost.useful_sec.items()]
    lines += ["", f"Device-hours {cost.device_hours:,.2f}; goodput {cost.goodput:.1%}"]
    if cost.device_hours:
        lines.append(f"{cost.tokens:,} tokens, {cost.tokens / cost.device_hours:,.0f} per device-hour")
    if price:
        lines.append(f"Cost {price * cost.device_hours:,.2f} at {price:g} per device-hour")
    return "\n".join(lines) + "\n"


def _time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36_000 else f"{seconds / HOUR_SEC:.1f} h"


def _draw(cost: Cost, path: Path) -> None:
    from matplotlib.figure import Figure

    useful = sum(cost.useful_sec.values())
    totals = {
        name: sum(a.seconds.get(name, 0.0) for a in cost.attempts) for name in LOSSES if name != "queue"
    }
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.subplots()
    left = 0.0
    for index, (name, seconds) in enumerate({"useful steps": useful, **totals}.items()):
        axes.barh(0, seconds, left=left, color=f"C{index}", label=f"{name} ({_time(seconds)})")
        left += seconds
    axes.set_yticks([])
    axes.set_xlabel("seconds of all attempts")
    axes.set_title(f"goodput {cost.goodput:.1%}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
