"""Signals ask; the ranks agree at the next step boundary."""

from __future__ import annotations

import signal
import time
from typing import Any

import torch
import torch.distributed as dist

from llada_megatron.runtime import device

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ONE_KEYPRESS_SEC = 0.5


class StopRequest:
    """Remembers the last signal of STOPPING; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.number = 0
        self._since_sec = 0.0
        self._before = {number: signal.signal(number, self._remember) for number in STOPPING}

    def _remember(self, number: int, _frame: Any) -> None:
        now_sec = time.monotonic()
        # One Ctrl-C reaches a launched rank twice: from the terminal and from the launcher.
        if self.number == signal.SIGINT == number and now_sec - self._since_sec > ONE_KEYPRESS_SEC:
            raise KeyboardInterrupt
        self.number, self._since_sec = number, now_sec

    def agreed(self) -> int:
        """The signal that some rank received, 0 if none did; the same on every rank."""
        number = torch.tensor(self.number, dtype=torch.int32, device=device.device())
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
