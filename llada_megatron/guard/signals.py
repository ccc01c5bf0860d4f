"""Signals ask; the ranks agree at the next step boundary."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist

from llada_megatron.runtime import device, interrupts


class StopRequest:
    """Remembers signals, those among them that arrived before it; who insists with Ctrl-C interrupts at once.

    `on_signal` is called as soon as one arrives, from a thread of its own: the handler itself waits while the
    main thread is inside a collective.
    """

    def __init__(self, on_signal: Callable[[], None]) -> None:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=(on_signal,), daemon=True)
        self._thread.start()
        self._before = interrupts.handle(interrupts.remember)
        if self.number:
            on_signal()

    @property
    def number(self) -> int:
        """The last signal; 0 if there was none."""
        return interrupts.remembered[-1] if interrupts.remembered else 0

    def _watch(self, on_signal: Callable[[], None]) -> None:
        while numbers := os.read(self._read_end, 64):
            if any(number in interrupts.STOPPING for number in numbers):
                on_signal()
        os.close(self._read_end)

    def agreed(self) -> int:
        """The signal that some rank received, 0 if none did; the same on every rank."""
        return self.agreed_with(False)[0]

    def agreed_with(self, asked: bool) -> tuple[int, bool]:
        """That signal, and whether some rank was asked for something else: both in one message."""
        words = torch.tensor([self.number, asked], dtype=torch.int32, device=device.device())
        dist.all_reduce(words, op=dist.ReduceOp.MAX)
        number, other = words.tolist()
        return number, bool(other)

    def release(self) -> None:
        """Give the signals back to whoever had them; what was remembered has been heard."""
        interrupts.give_back(self._before)
        interrupts.remembered.clear()
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)  # the thread reads the end, and ends
        self._thread.join()
