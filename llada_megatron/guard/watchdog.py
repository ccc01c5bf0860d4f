"""A process that makes no progress ends by itself, and leaves the stack of each of its threads behind."""

from __future__ import annotations

import faulthandler
import threading
import time
from pathlib import Path
from typing import TextIO

from llada_megatron.record.run_dir import RunDir


class Watchdog:
    """Ends the process with exit code 1 when, once started, `beat` is not called in time or a stop is late.

    Python's faulthandler keeps the time in a thread that needs no interpreter lock, so a main thread that is
    stuck inside a call to C is caught too. The stacks are in `run_dir/stacks/rank_00003.txt`.
    """

    def __init__(
        self, run_dir: Path, rank: int, *, hang_timeout_sec: float, stop_deadline_sec: float
    ) -> None:
        self._path = RunDir(run_dir).stacks_of(rank)
        self._file: TextIO | None = None
        self._hang_timeout_sec = hang_timeout_sec or float("inf")
        self._stop_deadline_sec = stop_deadline_sec or float("inf")
        self._ends_at = float("inf")  # when the stop that was asked for must be done
        self._lock = threading.Lock()

    def allow(self, *, hang_timeout_sec: float, stop_deadline_sec: float) -> None:
        """From now on it may take so long; a stop that was asked for already as well."""
        with self._lock:
            longer_sec = (stop_deadline_sec or float("inf")) - self._stop_deadline_sec
            if longer_sec:
                self._ends_at += longer_sec
            self._hang_timeout_sec = hang_timeout_sec or float("inf")
            self._stop_deadline_sec = stop_deadline_sec or float("inf")

    def start(self) -> None:
        """Begin to watch; OSError when run_dir cannot be written."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._file = self._path.open("w")
        self.beat()

    def beat(self) -> None:
        """The process made progress: the time starts anew."""
        with self._lock:
            left_sec = min(self._hang_timeout_sec, max(self._ends_at - time.monotonic(), 0.001))
            if self._file is not None and left_sec < float("inf"):
                faulthandler.dump_traceback_later(left_sec, file=self._file, exit=True)

    def stop_was_asked(self) -> None:
        """A signal came, perhaps before the start: from the first one on, the deadline counts.

        Any thread may call it.
        """
        with self._lock:
            self._ends_at = min(self._ends_at, time.monotonic() + self._stop_deadline_sec)
        self.beat()

    def close(self) -> None:
        """Stop watching; nothing is left behind."""
        with self._lock:
            if self._file is None:
                return
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._file = None
            if self._path.stat().st_size == 0:
                self._path.unlink()
