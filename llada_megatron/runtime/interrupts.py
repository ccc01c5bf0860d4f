"""What signals do to a process of ours, from its first moment to its last. Standard library alone.

A verb is interrupted: its clean-up runs, and it exits with 128 + the number. Training remembers instead,
until its ranks agree at a step (guard/signals.py). What was ignored when the process began (nohup) stays so.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from llada_megatron.config.errors import Interrupted

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
ONE_KEYPRESS_SEC = 0.5
REPEATS = 2
"""How often one Ctrl-C may reach a rank: from the terminal, and from the launcher that passes it on."""
AGAIN_SEC = 0.02
IMPORTING = "<frozen importlib._bootstrap>"
"""Where Python's code for imports says that it comes from."""

remembered: list[int] = []
"""Signals that arrived while `remember` handled them."""
_held: list[int] | None = None
"""Under `held_back`: signals that another thread got, which blocks none; handlers run in the first thread."""
_first_sec = {"Ctrl-C": 0.0, "interrupt": -ONE_KEYPRESS_SEC}


def remember(number: int, _frame: Any = None) -> None:
    """Keep a signal for later, as a handler; who presses Ctrl-C again after that is heard at once."""
    now_sec, presses = time.monotonic(), remembered.count(signal.SIGINT)
    remembered.append(number)
    if number != signal.SIGINT:
        return
    if not presses:
        _first_sec["Ctrl-C"] = now_sec
    elif presses >= REPEATS and now_sec - _first_sec["Ctrl-C"] > ONE_KEYPRESS_SEC:
        raise Interrupted(number)


def interrupt(number: int, frame: FrameType | None = None) -> None:
    """Raise Interrupted, as a handler; for one keypress once, since another would break into the clean-up.

    During an import a moment later: torch's ends the process with SIGABRT when something is raised in it, and
    others turn it into an error of their own.
    """
    if _held is not None:
        _held.append(number)
        return
    if _imports(frame):
        _send_later(number)
        return
    now_sec = time.monotonic()
    if now_sec - _first_sec["interrupt"] > ONE_KEYPRESS_SEC:
        _first_sec["interrupt"] = now_sec
        raise Interrupted(number)


def _imports(frame: FrameType | None) -> bool:
    """Whether this code runs for an import."""
    while frame is not None and frame.f_code.co_filename != IMPORTING:
        frame = frame.f_back
    return frame is not None


def _send_later(number: int) -> None:
    """Send this process a signal again. Not by threading.Timer, whose locks the handled code may hold."""

    def send() -> None:
        time.sleep(AGAIN_SEC)
        os.kill(os.getpid(), number)

    _thread.start_new_thread(send, ())


def _again(lost: sys.UnraisableHookArgs) -> None:
    """Send a signal again whose Interrupted was raised where nothing can be: Python only reports what a
    `__del__` or the callback of a weak reference raises, and goes on.
    """
    if not isinstance(lost.exc_value, Interrupted):
        sys.__unraisablehook__(lost)
        return
    _first_sec["interrupt"] = -ONE_KEYPRESS_SEC  # as if it had not been heard
    _send_later(lost.exc_value.args[0])


def handle(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Install it for STOPPING, except for what is ignored; returns the handlers before."""
    sys.unraisablehook = _again
    heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def give_back(handlers: dict[int, Any]) -> None:
    """Install what `handle` returned."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


def ignore() -> None:
    """For a process that has done its work and only leaves."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def held_back() -> Iterator[None]:
    """Signals wait meanwhile; a process that is started here keeps them waiting until it lets them in."""
    from multiprocessing import resource_tracker  # here: handlers stand before it is imported

    global _held
    outer, _held = _held, []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        resource_tracker.ensure_running()  # would be started by what follows, and lets SIGINT and SIGTERM in
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        yield
    finally:
        arrived, _held = _held, outer
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number in arrived:
            signal.raise_signal(number)


def let_in() -> None:
    """End `held_back` in a process that was started under it; what waited arrives now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


@contextmanager
def passed_on() -> Iterator[int]:
    """The reading end of a pipe that gets the numbers of signals that arrive meanwhile, one byte each.

    Raises Interrupted at the end where they would have interrupted: ranks that train save and return.
    """
    reading, writing = os.pipe()

    def note(number: int, _frame: Any) -> None:
        os.write(writing, bytes([number]))
        noted.append(number)
        if noted.count(signal.SIGINT) > REPEATS:
            interrupt(number)

    noted: list[int] = []
    handlers = handle(note)
    try:
        yield reading
    finally:
        give_back(handlers)
        remembered.extend(number for number in noted if handlers[number] is remember)
        os.close(reading)
        os.close(writing)
        if interrupting := [number for number in noted if handlers[number] is interrupt]:
            raise Interrupted(interrupting[0])


def end_with_parent() -> None:
    """Let this process, which multiprocessing started, be killed when the one that asked for it is gone."""
    import multiprocessing  # as in held_back

    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
