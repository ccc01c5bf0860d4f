"""Who owns which tokens of a sequence under context parallelism: equal counts, balanced attention work."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from operator import itemgetter

import numpy as np

from llada_megatron.config.errors import BadInput

BALANCED = 1.01
"""A deal of coarse units is taken when no rank has more than this times the mean work."""
WHOLE_GROUPS = 1.1
"""Noise groups, mostly of one block, are cut, which makes noisy keys travel, only when whole ones cannot be
dealt within this."""


def deal_tokens(work_L: np.ndarray, group_start_L: np.ndarray, block_size: int, ranks: int) -> np.ndarray:
    """Owner of each token, int64 [L]; every rank gets exactly L / ranks tokens.

    work_L: attention work of each token, in any unit. group_start_L: first token of each token's noise group,
    which is a block or several. Units of neighbouring tokens are dealt by falling work to the rank with the
    least so far. They are as long as balance allows (long runs are what kernels like), whole groups whenever
    those can be balanced, and pieces of blocks otherwise. Raises BadInput when L is not a multiple of ranks.
    """
    length = len(work_L)
    if length % ranks:
        raise BadInput(f"{length} tokens cannot be split evenly over {ranks} ranks: change layout.cp.")

    def edges_of(unit: int) -> np.ndarray:
        edges = np.arange(0, length, unit)
        return np.append(np.unique(group_start_L[edges]) if unit >= block_size else edges, length)

    blocks_per_rank = max(1, length // (ranks * block_size))
    coarse_to_fine = [block_size << power for power in reversed(range(blocks_per_rank.bit_length()))]
    deal = _first_balanced(work_L, map(edges_of, coarse_to_fine), ranks)
    if deal[0] > WHOLE_GROUPS and block_size > 1:
        pieces = [block_size >> power for power in range(1, block_size.bit_length())]
        deal = min(deal, _first_balanced(work_L, map(edges_of, pieces), ranks), key=itemgetter(0))
    return deal[1]


def _first_balanced(
    work_L: np.ndarray, candidates: Iterable[np.ndarray], ranks: int
) -> tuple[float, np.ndarray]:
    """Largest over mean work, and owners, of the first deal that is balanced, else of the best one."""
    best = np.inf, np.zeros(0, dtype=np.int64)
    for edges in candidates:
        owner = _deal(work_L, edges, ranks)
        load = np.bincount(owner, weights=work_L, minlength=ranks)
        best = min(best, (float(load.max() / load.mean()), owner), key=itemgetter(0))
        if best[0] <= BALANCED:
            break
    return best


def _deal(work_L: np.ndarray, edges: np.ndarray, ranks: int) -> np.ndarray:
    """Deal the units between `edges` greedily; a unit that exceeds a rank's room is cut there."""
    owner = np.empty(len(work_L), dtype=np.int64)
    work_before = np.append(0, np.cumsum(work_L))
    work_of_unit = work_before[edges[1:]] - work_before[edges[:-1]]
    room = [len(work_L) // ranks] * ranks
    ranks_by_load = [(0, rank) for rank in range(ranks)]
    for unit in np.argsort(-work_of_unit, kind="stable").tolist():
        start, stop = int(edges[unit]), int(edges[unit + 1])
        while start < stop:
            load, rank = heapq.heappop(ranks_by_load)
            cut = min(stop, start + room[rank])
            owner[start:cut] = rank
            room[rank] -= cut - start
            if room[rank]:
                heapq.heappush(ranks_by_load, (load + int(work_before[cut] - work_before[start]), rank))
            start = cut
    return owner
