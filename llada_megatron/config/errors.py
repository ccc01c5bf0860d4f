"""Errors that end a verb with one sentence, and every exit code of `llada`. Standard library only.

A class decides what happens next; the sentence is for people alone. Any other exception, a ValueError of
torch or numpy among them, is a bug: it keeps its traceback and is retried as a crash is.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterable

FAILED = 1
BAD_INPUT = 2
NODE_FAULT = 3
RUN_HELD = 4
INTERRUPTED = 130
READER_LEFT = 141
"""128 + SIGPIPE, as shells report it."""


class Interrupted(KeyboardInterrupt):
    """A signal ends a verb."""

    def __init__(self, number: int) -> None:
        super().__init__(number)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it."""
        return 128 + int(self.args[0])


class Refusal(Exception):
    """Ends a verb with its sentence, its exit code and no traceback."""

    exit_code = FAILED


class BadInput(Refusal, ValueError):
    """What a user can mend: a setting, a file, a combination. Another start would end in the same way."""

    exit_code = BAD_INPUT


class RunFailed(Refusal):
    """A run cannot go on although its input was accepted; another start may get further."""

    exit_code = FAILED


class RunHeld(Refusal):
    """Another process trains in the run's directory, or a lost one's ranks still live: a later start may."""

    exit_code = RUN_HELD


class NodeFault(Refusal):
    """Nodes of the machine are at fault: a start on others may succeed."""

    exit_code = NODE_FAULT

    def __init__(self, sentence: str, nodes: Iterable[str] = ()) -> None:
        """nodes: names of those that are at fault, once each; empty where it cannot be told."""
        super().__init__(sentence, tuple(dict.fromkeys(nodes)))

    @property
    def nodes(self) -> tuple[str, ...]:
        return self.args[1]

    def __str__(self) -> str:
        return self.args[0]


ABOUT_A_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
"""Errors of the operating system that the same path will have at the next start."""


def in_words(error: OSError) -> str:
    """What the operating system said, without its number, and the limit of this machine that it met."""
    if not error.strerror:
        return str(error)
    said = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return said + _limit(error.errno)


def limit_met(error: BaseException) -> str | None:
    """What `in_words` says where a library wrapped the system's answer; None for any other error."""
    said = (str(error).strip() or type(error).__name__).splitlines()[-1]
    for number in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if os.strerror(number) in said:
            return os.strerror(number) + _limit(number)
    if "can't start new thread" in said:
        return f"No thread can be started{_limit(errno.EAGAIN)}"
    if isinstance(error, MemoryError) or os.strerror(errno.ENOMEM) in said or "out of memory" in said:
        return f"Out of memory{_limit(errno.ENOMEM)}: {said}"
    return None


def _limit(number: int | None) -> str:
    """A clause on the limit behind an error: where it stands, what raises it; empty where none is known."""
    kinds = {
        errno.EMFILE: ("`ulimit -n` allows a process {} open files", resource.RLIMIT_NOFILE),
        errno.EAGAIN: ("`ulimit -u` allows {} processes and threads", resource.RLIMIT_NPROC),
        errno.ENOMEM: ("`ulimit -v` allows a process {} bytes", resource.RLIMIT_AS),
        errno.EFBIG: ("`ulimit -f` allows files of {} bytes", resource.RLIMIT_FSIZE),
        errno.EIO: ("`ulimit -f` allows files of {} bytes", resource.RLIMIT_FSIZE),
    }
    if number == errno.ENFILE:
        return " (all that `sysctl fs.file-max` allows are in use)"
    if number not in kinds:
        return ""
    words, kind = kinds[number]
    soft, _ = resource.getrlimit(kind)
    return "" if soft == resource.RLIM_INFINITY else f" ({words.format(f'{soft:,}')}: raise it)"
