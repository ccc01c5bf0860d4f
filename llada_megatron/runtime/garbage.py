"""Python's garbage collector, by hand: all ranks collect at the same step instead of each when it likes.

Of 512 ranks some one is in a collection in most steps otherwise, and all others wait for it. What was built
before training is frozen: it stays to the end, and a collection need not look at it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def by_hand(every_steps: int) -> Iterator[None]:
    """Nothing is collected but by `collect`; every_steps 0: as Python likes."""
    if not every_steps or not gc.isenabled():
        yield
        return
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def collect(step: int, every_steps: int) -> None:
    """Collect when so many steps are done."""
    if every_steps and step % every_steps == 0:
        gc.collect()
