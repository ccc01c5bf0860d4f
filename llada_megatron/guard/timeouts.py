"""How long a message, a process without progress and a stop may take: what is set, or what a save needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llada_megatron.config.schema import TrainingConfig
from llada_megatron.record.pace import Pace


@dataclass(frozen=True)
class Timeouts:
    """Seconds; 0: no limit."""

    collective_timeout_sec: float
    """Of a message between ranks; the first of them to be done with a save waits for the last."""
    hang_timeout_sec: float
    stop_deadline_sec: float


def fitted(settings: TrainingConfig, pace: Pace) -> tuple[Timeouts, list[str]]:
    """The settings, raised to what this run's saves need, and a sentence for each that was.

    A limit that a save may pass would end every attempt in the middle of a checkpoint. Each is at least twice
    the longest save, that of a stop also twice the longest step.
    """
    needed = dict.fromkeys(Timeouts.__dataclass_fields__, 2 * pace.save_sec)
    needed["stop_deadline_sec"] = pace.stop_sec
    said, fitting = [], {}
    for name, seconds in needed.items():
        limit = getattr(settings, name)
        fitting[name] = limit
        if 0 < limit < seconds:
            fitting[name] = float(math.ceil(seconds))
            said.append(
                f"training.{name}={limit:g} is raised to {fitting[name]:g}: a save of this run took"
                f" {pace.save_sec:.0f} s, a step {pace.step_sec:.0f} s."
            )
    return Timeouts(**fitting), said
