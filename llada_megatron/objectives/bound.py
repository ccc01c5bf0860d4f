"""Masks and weights of the likelihood bound: exact counts instead of rates.

For a block of m tokens,  -log p(block | clean history) <= E_k E_{|M| = k} [ m/k sum_{i in M} CE_i ]  with k
uniform in 1..m and M a uniform subset of that size (LLaDA, arXiv 2502.09992, eq. 6; the any-order form of the
1/t loss). The weight is at most m, so the variance is finite; with m = 1 the bound is the exact NLL.
"""

from __future__ import annotations

import numpy as np

from llada_megatron.parallel.random import Purpose, generator

GOLDEN_RATIO = 0.6180339887498949


def exact_count_mask(
    seed: int, sequence: int, draw: int, draws: int, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """masked bool [L] and weights float64 [L] (m/k where masked) of one draw for one sequence.

    starts: int64 [L], the first position of each position's block (attention/mask.py: block_starts). k is
    stratified: over a block's draws it steps evenly through 1..m, over blocks and sequences it follows a
    Weyl sequence with one random shift, which leaves every single k uniform.
    """
    length = len(starts)
    block, size = np.unique(starts, return_inverse=True, return_counts=True)[1:]
    first = np.unique(starts)
    shift = generator(seed, Purpose.EVALUATION_COUNT, 0).random()
    u = (shift + GOLDEN_RATIO * (sequence * length + first) + draw / draws) % 1.0
    count = 1 + np.floor(u * size).astype(np.int64)
    score = generator(seed, Purpose.EVALUATION_MASK, sequence * draws + draw).random(length)
    order = np.lexsort((score, starts))
    masked = np.zeros(length, dtype=bool)
    masked[order] = np.arange(length) - first[block[order]] < count[block[order]]
    return masked, np.where(masked, (size / count)[block], 0.0)
