"""How a run ended, as its ranks tell whoever launched them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Outcome:
    """How a run ended: `finished`, or the signal that stopped it."""

    step: int
    """Steps that are done."""
    total_steps: int
    """Of the schedule."""
    signal: int
    finished: bool
