"""Noise groups of several blocks: what objective `multi_block` draws (docs/multi_block.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llada_megatron.config.choices import GroupRates
from llada_megatron.config.ranges import Range, Share

GroupLayout = tuple[int, int] | None
"""Blocks of each group and of the shorter one before them; None for groups of random sizes."""


@dataclass
class MultiBlockConfig:
    """MultiTF of MBD-LMs (arXiv 2606.29215). Each sequence is read once under each layout of groups."""

    group_size: Annotated[int, Range(at_least=1, at_most=64)] = 2
    """G: blocks of the largest group; 1: each block is one, as in objective `diffusion`."""
    systematic: bool = True
    """The layouts of every size from 2 to G, shifted by 0 to one less than the size."""
    random_layouts: Annotated[int, Range(at_least=0, at_most=64)] = 0
    """So many layouts more, whose sizes are drawn from 2..G for each document."""
    rates: GroupRates = GroupRates.chain
    rate_margin: Annotated[float, Range(at_least=0, below=1)] = 0.0
    """`chain` draws up to mask_rate_max less this share of the range; 0.01 in the published settings."""

    @property
    def layouts(self) -> list[GroupLayout]:
        """Sample i of a run is under layout i modulo their number."""
        if self.group_size == 1:
            return [(1, 0)]
        sizes = range(2, self.group_size + 1) if self.systematic else ()
        shifted: list[GroupLayout] = [(size, shift) for size in sizes for shift in range(size)]
        return shifted + [None] * self.random_layouts

    def mean_rate(self, low: Share, high: Share) -> float:
        """Mean share of the positions that are masked, of long sequences and blocks."""
        if self.rates is GroupRates.independent:
            return (low + high) / 2
        shares = [_share_of_groups(layout, self.group_size) for layout in self.layouts]
        high -= self.rate_margin * (high - low)
        return high - (high - low) * sum(shares) / max(1, len(shares))


def _share_of_groups(layout: GroupLayout, largest: int) -> float:
    """The blocks' mean distance from the highest rate, of the range: 1/4 the first one's, half each next."""
    sizes = range(2, largest + 1) if layout is None else [layout[0]]
    return sum((1 - 0.5**size) / 2 for size in sizes) / sum(sizes)
