"""What of a sequence a forward reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llada_megatron.generate.branches import Branch
from llada_megatron.generate.running import Running


@dataclass
class Part:
    """Rows of one version of a sequence."""

    kept: int | slice
    """Which rows of the sequence they are, or the first one, up to the last: of `PooledKeys`."""
    places: np.ndarray
    """int64, where the keys of all are kept."""
    tokens: np.ndarray
    """int64 [n]"""
    weights: np.ndarray
    """float32 [n], `Change.weight_m`."""
    rows: np.ndarray
    """int64, which of them the head is applied to."""


@dataclass
class Feed:
    """What of a sequence the next forward reads: the tokens that are not kept, up to `stop`.

    Further branches on this rank follow as parts of their own: their active blocks, which see what lies in
    front of these and not each other.
    """

    running: Running
    stop: int
    rows: list[np.ndarray]
    """Positions that the rule reads, of each branch of the sequence; of none where the active blocks are not
    reached yet."""
    here: list[int]
    """Which of the branches this rank reads."""

    def parts(self) -> Iterator[Part]:
        """What of the sequence is read, each behind the keys that are kept."""
        running = self.running
        if not self.rows:
            yield self._part(running.anchor, running.kept, self.stop, running.places(self.stop))
        for number, which in enumerate(self.here):
            branch = running.branches[which]
            kept, beside = (running.first, number - 1) if number else (running.kept, None)
            places = running.places(branch.stop, beside)
            yield self._part(branch, kept, branch.stop, places, self.rows[which])

    def _part(
        self, branch: Branch, kept: int, stop: int, places: np.ndarray, rows: Sequence[int] | np.ndarray = ()
    ) -> Part:
        here = slice(kept, stop)
        chosen = np.asarray(rows, np.int64) - kept
        return Part(kept, places, branch.tokens[here], self.running.weights[here], chosen)
