"""The account of a run: where its time went, attempt by attempt, and on how many devices."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from llada_megatron.jobs import slurm
from llada_megatron.jobs.slurm import Allocation
from llada_megatron.record import events
from llada_megatron.record.events import Event
from llada_megatron.record.metrics import STEP_FIELDS, Record, read_jsonl, step_seconds
from llada_megatron.record.run_dir import RunDir

LOSSES = ("start-up", "replayed steps", "checkpoints", "evaluation", "other")
HOUR_SEC = 3600
CLOCKS_SEC = 2
"""What a node's clock and the controller's may differ by; sacct's seconds are whole."""


@dataclass
class Attempt:
    """Where the time of one attempt went, on each of its devices; the queue before it held none."""

    number: int
    devices: int
    queue_sec: float
    useful_sec: dict[str, float]
    """Steps that are part of the run, by stage; a replayed step counts where it was done last."""
    lost_sec: dict[str, float]
    """By LOSSES; together with useful_sec the whole attempt."""
    outcome: str

    @property
    def allocated_sec(self) -> float:
        """From its start to its end."""
        return sum(self.useful_sec.values()) + sum(self.lost_sec.values())


@dataclass
class Cost:
    """What a run has taken so far."""

    attempts: list[Attempt]
    tokens: int = 0

    @property
    def useful_hours(self) -> dict[str, float]:
        """Device-hours of useful steps, by stage."""
        return self._hours("useful_sec")

    @property
    def lost_hours(self) -> dict[str, float]:
        """Device-hours by LOSSES."""
        return self._hours("lost_sec")

    @property
    def device_hours(self) -> float:
        """All of them: the sum of those above."""
        return sum(attempt.allocated_sec * attempt.devices for attempt in self.attempts) / HOUR_SEC

    @property
    def goodput(self) -> float:
        """Useful device-hours over all, 0 to 1."""
        return sum(self.useful_hours.values()) / self.device_hours if self.device_hours else 0.0

    def _hours(self, seconds_of: str) -> dict[str, float]:
        hours: dict[str, float] = defaultdict(float)
        for attempt in self.attempts:
            for name, seconds in getattr(attempt, seconds_of).items():
                hours[name] += seconds * attempt.devices / HOUR_SEC
        return dict(hours)


def account(run_dir: Path, record: list[Event], now: float | None = None) -> Cost:
    """The account of a run from its record, and from Slurm's accounting where the site has one.

    Of a running attempt up to `now`, seconds since 1970.
    """
    steps = read_jsonl(RunDir(run_dir).metrics, *STEP_FIELDS)
    jobs = dict.fromkeys(event["job"] for event in record if event["event"] == "started" and event.get("job"))
    in_slurm = slurm.allocations(jobs) if jobs else {}
    starts = [index for index, event in enumerate(record) if event["event"] == "started"]
    attempts = []
    for number, (begin, after) in enumerate(zip(starts, [*starts[1:], len(record)], strict=True)):
        before, part, later = record[:begin], record[begin:after], record[after:]
        waited_since = events.last(before, "submitted", "ended") or part[0]
        ended = events.last(part, "ended")
        allocation = _allocation(in_slurm.get(part[0].get("job", ""), []), part[0]["time"]) or Allocation(
            waited_since["time"], part[0]["time"], None
        )
        end = allocation.ended_at or (ended["time"] if ended else now or time.time())
        useful, lost = _spent(part, later, steps, allocation.started_at, end)
        attempts.append(
            Attempt(
                number,
                part[0].get("devices", 1),
                max(0.0, allocation.started_at - allocation.queued_at),
                useful,
                lost,
                ended["outcome"] if ended else "running",
            )
        )
    return Cost(attempts, steps[-1]["consumed_tokens"] if steps else 0)


def _allocation(known: list[Allocation], started_at: float) -> Allocation | None:
    """The one that an attempt ran in, by its time: job numbers come again, and records may be purged."""
    begun = [each for each in known if each.started_at <= started_at + CLOCKS_SEC]
    if not begun or (begun[-1].ended_at or started_at) < started_at - CLOCKS_SEC:
        return None
    return begun[-1]


def _spent(
    part: list[Event], later: list[Event], steps: list[Record], begin: float, end: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of an attempt by stage and by LOSSES; together `end - begin`.

    What is useful is known best, what was replayed (as many mean steps) least: what is left is shared out in
    that order, and the rest is `other`.
    """
    first = next((event for event in part if event["event"] == "first_step"), None)
    again = next((event for event in later if event["event"] == "first_step"), None)
    own = steps[first["step"] : again["step"] if again else len(steps)] if first else []
    mean_sec = sum(map(step_seconds, steps)) / len(steps) if steps else 0.0
    left = end - begin

    def take(seconds: float) -> float:
        nonlocal left
        taken = min(max(0.0, seconds), left)
        left -= taken
        return taken

    useful: dict[str, float] = defaultdict(float)
    for step in own:
        useful[step["stage"]] += take(step_seconds(step))
    if first is None:
        return {}, {"start-up": left}
    first_sec = step_seconds(own[0]) if own else mean_sec
    lost = {"start-up": take(first["time"] - first_sec - begin)}
    for name, event_name in (("checkpoints", "saved"), ("evaluation", "evaluated")):
        lost[name] = take(sum(event["seconds"] for event in part if event["event"] == event_name))
    lost["replayed steps"] = take(again["replayed"] * mean_sec if again else 0.0)
    return dict(useful), {**lost, "other": left}
