"""How long a run's steps and saves have taken, by its own record. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llada_megatron.record import events
from llada_megatron.record.metrics import STEP_FIELDS, read_jsonl, step_seconds
from llada_megatron.record.run_dir import RunDir

STEPS_LOOKED_AT = 200


@dataclass(frozen=True)
class Pace:
    """The longest that a step and a save have taken; 0 where it is not known."""

    step_sec: float = 0.0
    save_sec: float = 0.0

    @property
    def stop_sec(self) -> float:
        """From a signal to the end: the rest of a step and a save, twice over."""
        return 2 * (self.step_sec + self.save_sec)


def pace_of(run_dir: Path) -> Pace:
    """Of a run's last steps, and of all its saves."""
    steps = read_jsonl(RunDir(run_dir).metrics, *STEP_FIELDS)
    whole = ("saved", "published")  # in the background, what training waited for, and all of it
    saves = [event["seconds"] for event in events.read(run_dir) if event["event"] in whole]
    step_sec = max(map(step_seconds, steps[-STEPS_LOOKED_AT:]), default=0.0)
    return Pace(step_sec, max(saves, default=0.0))
