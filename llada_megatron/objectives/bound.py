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
    seed: int,
    sequence: int,
    draw: int,
    draws: int,
    starts: np.ndarray,
    supervised: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """masked bool [L] and weights float64 [L] (m/k where masked) of one draw for one sequence.

    starts: int64 [L], the first position of each position's block (attention/mask.py: block_starts);
    supervised: bool [L], the tokens to score, which alone are counted in m and masked; None for all. k is
    stratified: over a block's draws it steps evenly through 1..m, over blocks and sequences it follows a
    Weyl sequence with one random shift, which leaves every single k uniform.
    """
    length = len(starts)
    scored = np.arange(length) if supervised is None else np.flatnonzero(supervised)
    first, block, size = np.unique(starts[scored], return_inverse=True, return_counts=True)
    shift = generator(seed, Purpose.EVALUATION_COUNT, 0).random()
    u = (shift + GOLDEN_RATIO * (sequence * length + first) + draw / draws) % 1.0
    count = 1 + np.floor(u * size).astype(np.int64)
    score = generator(seed, Purpose.EVALUATION_MASK, sequence * draws + draw).random(length)[scored]
    order = np.lexsort((score, block))
    place = np.arange(len(scored)) - (np.cumsum(size) - size)[block[order]]  # by score, within its block
    masked, weights = np.zeros(length, dtype=bool), np.zeros(length)
    masked[scored[order]] = place < count[block[order]]
    weights[scored] = (size / count)[block]
    return masked, np.where(masked, weights, 0.0)


def complementary_count_mask(
    seed: int,
    document: int,
    draw: int,
    draws: int,
    starts: np.ndarray,
    supervised: np.ndarray,
    streams: tuple[Purpose, Purpose] = (Purpose.PREFERENCE_COUNT, Purpose.PREFERENCE_MASK),
) -> tuple[np.ndarray, np.ndarray]:
    """As `exact_count_mask`, of one document, whose number in its corpus is all that the masks depend on.

    streams: of random numbers, for the counts and for the subsets.

    draws: 1, or an even number: draws 2j and 2j + 1 then score a subset of k of each block's m tokens and
    its complement, k uniform in 0..m, with the weights (m + 1)/k and (m + 1)/(m - k). Every token is scored
    once by the two, and sum over k in 1..m of 1/(m + 1) (m + 1)/k is that of 1/m m/k, so that the bound is
    the same.
    """
    pairs = max(1, draws // 2)
    pair, is_complement = divmod(draw, 2) if draws > 1 else (0, 0)
    scored = np.flatnonzero(supervised)
    block, size = np.unique(starts[scored], return_inverse=True, return_counts=True)[1:]
    ways = size + 1 if draws > 1 else size
    # Stratified over the pairs of draws: u steps evenly through [0, 1) from a random place of each block.
    u = (generator(seed, streams[0], document).random(len(size)) + pair / pairs) % 1.0
    count = np.floor(u * ways).astype(np.int64) + (draws == 1)
    score = generator(seed, streams[1], document * pairs + pair).random(len(scored))
    order = np.lexsort((score, block))
    place = np.arange(len(scored)) - (np.cumsum(size) - size)[block[order]]
    chosen = np.empty(len(scored), dtype=bool)
    chosen[order] = place < count[block[order]]
    if is_complement:
        chosen, count = ~chosen, size - count
    masked, weights = np.zeros(len(starts), dtype=bool), np.zeros(len(starts))
    masked[scored] = chosen
    weights[scored] = np.where(chosen, (ways / np.maximum(count, 1))[block], 0.0)
    return masked, weights
