"""Runs programs that a model wrote, each in a process of its own that can compute and nothing else.

Nothing runs until `allow_code()` was called. What each guard keeps out is in docs/tasks.md; neither is a
virtual machine, and whoever expects an adversary should start `llada eval` in one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llada_megatron.config.errors import BadInput, RunFailed
from llada_megatron.tasks import code_box

FILTER, HOOK = "filter", "hook"
"""Guards: the kernel's filter of system calls (seccomp), and an audit hook of Python."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    cpu_sec: int = 10
    wall_sec: float = 30.0
    memory_bytes: int = 1 << 30


@dataclass(frozen=True)
class Ending:
    """How a program ended: whether it came to its end, and in words why not."""

    passed: bool
    reason: str


_allowed = False


def allow_code() -> None:
    """From now on this process may run generated programs; `llada eval --allow-code` calls it."""
    global _allowed
    _allowed = True


def require_allowed(task: str) -> None:
    """Raises BadInput where a task would run generated programs and nobody allowed it."""
    if not _allowed:
        raise BadInput(
            f"{task} runs programs that the model writes, on this machine: allow it with --allow-code "
            "(docs/tasks.md says what they can and cannot do)."
        )


def run_program(program: str, limits: Limits = Limits(), guard: str | None = None) -> Ending:
    """Run a program's text to its end or to a limit; never raises for what the program does.

    It passes where every statement ran without an exception. guard: the strongest of this machine where it is
    None. Its folder is empty, and removed afterwards; its output goes nowhere.
    """
    token = secrets.token_hex(16)
    orders = {
        "program": program,
        "token": token,
        "guard": guard or strongest_guard(),
        "cpu_sec": limits.cpu_sec,
        "memory_bytes": limits.memory_bytes,
    }
    with tempfile.TemporaryDirectory(prefix="llada-program-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(Path(code_box.__file__).resolve())],
            cwd=folder,
            env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # numpy starts threads otherwise
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin as orders_pipe:  # type: ignore[union-attr]
                orders_pipe.write(json.dumps(orders).encode())
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limits.wall_sec)
        finally:
            # All that it started, should it have got that far; its own id is ours until it is waited for.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            timed_out = process.returncode is None
            process.wait()
        with process.stdout as verdict:  # type: ignore[union-attr]
            os.set_blocking(verdict.fileno(), False)
            said = (verdict.read(1024) or b"").decode(errors="replace")
    if timed_out:
        return Ending(False, "out of time")
    return _ending(said, token, process.returncode)


def _ending(said: str, token: str, code: int) -> Ending:
    before, _, ending = said.partition(" ")
    if before == token and ending == "passed":
        return Ending(True, "passed")
    if before == token:
        return Ending(False, "out of memory" if ending == "MemoryError" else f"failed: {ending}")
    if code in (-signal.SIGSYS, code_box.FORBIDDEN):
        return Ending(False, "forbidden: a process, a socket, a signal, or a file to write")
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return Ending(False, "out of time")
    return Ending(False, f"ended itself with code {code}" if code >= 0 else f"ended by signal {-code}")


@cache
def strongest_guard() -> str:
    """FILTER where the kernel takes it, else HOOK, with a warning; RunFailed where no program runs at all."""
    if run_program("pass", guard=FILTER).passed:
        return FILTER
    ending = run_program("pass", guard=HOOK)
    if not ending.passed:
        raise RunFailed(f"Generated programs cannot be run on this machine: an empty one {ending.reason}.")
    logging.getLogger(__name__).warning(
        "This kernel takes no filter of system calls: limits and Python alone hold generated programs."
    )
    return HOOK
