"""How many blocks of a sequence are decoded at a time: D2F's pipeline, MultiBD's block buffer.

Blocks behind the first unfinished one see what has been decided before them so far, masks and all. A model
has to have learnt that: objective `multi_block`, or D2F's training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llada_megatron.config.ranges import Count, Share


@dataclass(frozen=True)
class Buffer:
    """When a block becomes active beside those before it, and when it has to fill masks.

    D2F (arXiv 2508.09192), of which MBD-LMs' MultiBD (arXiv 2606.29215, algorithm 5) bounds the blocks. The
    first active block has to fill at least one mask in each forward, one behind it from `force_at` on.
    """

    blocks: Count = 1
    """Active at most; 0: as many as the answer has. 1 is decoding block by block."""
    add_at: Share = 0.1
    """The decided share of the last active block from which on one more becomes active (tau_add)."""
    force_at: Share = 0.9
    """The decided share of a block from which on the next one has to fill masks (D2F's tau_act, MultiBD's
    tau_semi)."""

    def wants_more(self, decided: Sequence[float]) -> bool:
        """Whether a block joins those of which these shares are decided."""
        return (not self.blocks or len(decided) < self.blocks) and decided[-1] >= self.add_at

    def must_fill(self, decided: Sequence[float]) -> list[bool]:
        """Of each active block, from the shares of all that are decided."""
        return [True, *(before >= self.force_at for before in decided[:-1])]


ONE_BLOCK = Buffer()
