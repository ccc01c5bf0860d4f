"""What keeps the routers of experts in bounds beside their bias (docs/experts.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llada_megatron.config.ranges import Range


@dataclass
class RouterConfig:
    """Guards and losses of the routers; with its defaults a router does what the model says alone."""

    rows_cap: Annotated[float, Range(at_least=0, at_most=1e6)] = 0.0
    """In training a rank's experts take at most so many times their mean of a micro-batch's rows, from each
    rank that sends; the assignments of the lowest weight are dropped. At least 1; 0: all are taken."""
