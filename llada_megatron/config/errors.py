"""Errors that end a verb with one sentence, and every exit code of `llada`. Standard library only.

A class decides what happens next; the sentence is for people alone. Any other exception, a ValueError of
torch or numpy among them, is a bug: it keeps its traceback and is retried as a crash is.
"""

from __future__ import annotations

import errno
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
    """What the operating system said, without its number."""
    if not error.strerror:
        return str(error)
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
