"""Tokens of documents from files: positioned reads, and the kernel is told what comes next.

A mapped file would be read ahead by megabytes for each piece of some kilobytes, and a page fault holds the
interpreter's lock while a disk seeks. Here nothing is read ahead that is not asked for, the pieces of a
sequence are announced before the first is waited for, and other threads run meanwhile.
"""

from __future__ import annotations

import os
import resource
import threading
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy

from llada_megatron.config.errors import BadInput
from llada_megatron.data.corpus import IDX_HEADER_BYTES

Piece = tuple[int, int, int | None]
"""Document, first token, and number of tokens (None: to the document's end)."""


class TokenFiles:
    """The documents of .bin/.idx pairs, numbered on from pair to pair."""

    def __init__(self, pairs: Sequence[tuple[str, str, int]]) -> None:
        """pairs: prefix, dtype and documents of each; BadInput for more than may be open at once."""
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()
        self._pairs = [(prefix, numpy.dtype(dtype), documents) for prefix, dtype, documents in pairs]
        self._ends = [*accumulate(documents for _, _, documents in pairs)]
        _allow_files(2 * len(pairs))

    def read(self, pieces: Sequence[Piece]) -> list[numpy.ndarray]:
        """The tokens of each piece, in their files' dtypes. Raises BadInput where a file has been cut off."""
        places = [self._place(*piece) for piece in pieces]
        if len(places) > 1:
            for file, dtype, start, count in places:
                os.posix_fadvise(file, start, count * dtype.itemsize, os.POSIX_FADV_WILLNEED)
        return [
            numpy.frombuffer(self._bytes(file, count * dtype.itemsize, start), dtype)
            for file, dtype, start, count in places
        ]

    def _place(
        self, document: int, first: int, count: int | None
    ) -> tuple[int, numpy.dtype[numpy.number], int, int]:
        """File, dtype, first byte and number of tokens of a piece."""
        number = bisect_right(self._ends, document)
        prefix, dtype, documents = self._pairs[number]
        own = document - self._ends[number] + documents
        index = self._file(f"{prefix}.idx")
        if count is None:
            length = self._bytes(index, 4, IDX_HEADER_BYTES + 4 * own)
            count = int.from_bytes(length, "little") - first
        offset = self._bytes(index, 8, IDX_HEADER_BYTES + 4 * documents + 8 * own)
        start = int.from_bytes(offset, "little") + first * dtype.itemsize
        return self._file(f"{prefix}.bin"), dtype, start, count

    def _bytes(self, file: int, count: int, start: int) -> bytes:
        found = os.pread(file, count, start)
        if len(found) < count:
            path = next(path for path, descriptor in self._open.items() if descriptor == file)
            raise BadInput(f"{path} ends before byte {start + count}: it was cut off since the run began.")
        return found

    def _file(self, path: str) -> int:
        file = self._open.get(path)
        if file is None:
            with self._lock:
                file = self._open.get(path)
                if file is None:
                    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
                    self._open[path] = file
        return file

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)


_OTHER_FILES = 256
"""Of libraries, sockets and logs."""


def _allow_files(more: int) -> None:
    """Raise this process's limit of open files by as many; BadInput where the system's is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and more + _OTHER_FILES > hard:
        raise BadInput(
            f"The data has {more // 2} shards, and a process may open {hard} files in all: raise"
            " `ulimit -Hn`, or prepare fewer and larger shards."
        )
    enough = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
