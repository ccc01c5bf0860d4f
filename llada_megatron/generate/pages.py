"""Where a cache keeps the blocks of which sequence: pages of one block, shared by sequences that begin alike.

What a page holds is a function of the tokens up to its end, so a prefix is known by the digest of those
tokens.
"""

from __future__ import annotations

import hashlib
import heapq

import numpy as np

START = b""
"""The digest of no tokens."""


def prefix(before: bytes, block: np.ndarray) -> bytes:
    """The digest of a sequence's tokens up to the end of a block, from that of the tokens before it."""
    return hashlib.blake2b(before + block.tobytes(), digest_size=16).digest()


class Pages:
    """Which of `count` pages are in use, and what the others still hold.

    A page that nobody uses any more keeps its block until room is needed: the least recently used one goes
    first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._users = [0] * count
        self._empty = list(range(count))  # a heap: pages of a sequence mostly follow each other
        self._digest: dict[int, bytes] = {}
        self._page: dict[bytes, int] = {}
        self._kept: dict[int, None] = {}  # unused pages that hold a prefix, the least recently used one first

    @property
    def available(self) -> int:
        """Pages that `take` would give."""
        return len(self._empty) + len(self._kept)

    def take(self) -> int | None:
        """A page to write to, or None where every page is in use."""
        if self._empty:
            page = heapq.heappop(self._empty)
        elif self._kept:
            page = next(iter(self._kept))
            del self._kept[page]
            del self._page[self._digest.pop(page)]
        else:
            return None
        self._users[page] = 1
        return page

    def share(self, digest: bytes) -> int | None:
        """The page that holds the last block of a prefix, for one user more; None where none does."""
        page = self._page.get(digest)
        if page is not None:
            self._users[page] += 1
            self._kept.pop(page, None)
        return page

    def holds(self, page: int, digest: bytes) -> None:
        """From now on `share` finds this page, unless another one holds the same."""
        if digest not in self._page and page not in self._digest:
            self._page[digest], self._digest[page] = page, digest

    def release(self, page: int) -> None:
        """One user of a page less."""
        self._users[page] -= 1
        if not self._users[page]:
            if page in self._digest:
                self._kept[page] = None
            else:
                heapq.heappush(self._empty, page)
