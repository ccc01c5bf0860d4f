"""What of a sequence a forward reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llada_megatron.attention.keys import PoolPart
from llada_megatron.generate.branches import Block, Branch
from llada_megatron.generate.running import Running


@dataclass
class Part:
    """Rows of one version of a sequence."""

    keys: PoolPart
    """Which rows of the sequence they are, and where its keys are kept."""
    tokens: np.ndarray
    """int64 [n]"""
    weights: np.ndarray
    """float32 [n], `Change.weight_m`."""
    rows: np.ndarray
    """int64, which of them the head is applied to."""
    labels: np.ndarray
    """int64, the tokens that the head is asked for there (`Figures.label`)."""


def shadow_of(running: Running, block: slice, keys: PoolPart, rows: np.ndarray) -> Part:
    """A shadow of a block, whose head says what becomes of the tokens at `rows`, positions int64 [n]."""
    masks = np.full(block.stop - block.start, running.mask_token_id)
    return Part(keys, masks, np.ones(len(masks), np.float32), rows - block.start, running.tokens[rows])


@dataclass
class Feed:
    """What of a sequence the next forward reads: the tokens that are not kept, up to `stop`.

    Further branches on this rank follow as parts of their own: their active blocks, which see what lies in
    front of these and not each other. So do shadows of active blocks.
    """

    running: Running
    stop: int
    rows: list[np.ndarray]
    """Positions that the rule reads, of each branch of the sequence and each shadow; of none where the active
    blocks are not reached yet."""
    here: list[int]
    """Which of them this rank reads."""
    shadows: list[Block]
    """The blocks that the shadows are of."""

    def parts(self) -> Iterator[Part]:
        """What of the sequence is read, each behind the keys that are kept."""
        running, branches = self.running, self.running.branches
        if not self.rows:
            yield self._part(running.anchor, running.kept, self.stop, running.places(self.stop))
        for number, which in enumerate(self.here):
            if which >= len(branches):
                yield self._shadow(self.shadows[which - len(branches)], self.rows[which])
                continue
            branch = branches[which]
            kept, beside = (running.first, number - 1) if number else (running.kept, None)
            places = running.places(branch.stop, beside)
            yield self._part(branch, kept, branch.stop, places, self.rows[which])

    def _part(
        self, branch: Branch, kept: int, stop: int, places: np.ndarray, rows: Sequence[int] | np.ndarray = ()
    ) -> Part:
        here, chosen = slice(kept, stop), np.asarray(rows, np.int64)
        return Part(
            PoolPart(kept, places),
            branch.tokens[here],
            self.running.weights[here],
            chosen - kept,
            branch.tokens[chosen],
        )

    def _shadow(self, block: Block, rows: np.ndarray) -> Part:
        running, own = self.running, slice(block.start, block.stop)
        keys = PoolPart(own, running.places(block.stop), running.places(block.stop, beside=0)[own])
        return shadow_of(running, own, keys, rows)
