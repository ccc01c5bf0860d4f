"""Signals ask; the ranks agree at the next step boundary."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from llada_megatron.runtime import device, launch

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ONE_KEYPRESS_SEC = 0.5


class StopRequest:
    """Remembers the last signal of STOPPING; a second SIGINT interrupts at once.

    `on_signal` is called as soon as one arrives, from a thread of its own: the handler itself waits while the
    main thread is inside a collective.
    """

    def __init__(self, on_signal: Callable[[], None]) -> None:
        self.number = launch.remembered[-1] if launch.remembered else 0
        self._since_sec = 0.0
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=(on_signal,), daemon=True)
        self._thread.start()
        self._before = {number: signal.signal(number, self._remember) for number in STOPPING}

    def _remember(self, number: int, _frame: Any) -> None:
        now_sec = time.monotonic()
        # One Ctrl-C reaches a launched rank twice: from the terminal and from the launcher.
        if self.number == signal.SIGINT == number and now_sec - self._since_sec > ONE_KEYPRESS_SEC:
            raise KeyboardInterrupt
        self.number, self._since_sec = number, now_sec

    def _watch(self, on_signal: Callable[[], None]) -> None:
        while numbers := os.read(self._read_end, 64):
            if any(number in STOPPING for number in numbers):
                on_signal()
        os.close(self._read_end)

    def agreed(self) -> int:
        """The signal that some rank received, 0 if none did; the same on every rank."""
        number = torch.tensor(self.number, dtype=torch.int32, device=device.device())
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)  # the thread reads the end, and ends
        self._thread.join()
