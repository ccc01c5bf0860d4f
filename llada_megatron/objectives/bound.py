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
    seed: int, document: int, draw: int, draws: int, starts: np.ndarray, supervised: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As `exact_count_mask`, of one document, whose number in its corpus is all that the masks depend on.

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
    u = (generator(seed, Purpose.PREFERENCE_COUNT, document).random(len(size)) + pair / pairs) % 1.0
    count = np.floor(u * ways).astype(np.int64) + (draws == 1)
    score = generator(seed, Purpose.PREFERENCE_MASK, document * pairs + pair).random(len(scored))
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


def antithetic_count_mask(
    seed: int, number: int, draw: int, draws: int, starts: np.ndarray, scored: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As `exact_count_mask`, of one text, whose number is all that the masks depend on.

    Draws 2j and 2j + 1 score a subset of k of each block's m tokens and what is left of it with one token of
    it, m + 1 - k tokens, so that every token is scored. Both counts are uniform in 1..m and both subsets
    uniform, so either draw by itself has the bound as its mean. Where a cross entropy hardly depends on the
    mask the two weights, m / k and m / (m + 1 - k), leave no variance; those of `complementary_count_mask`,
    which differences of bounds cancel, would.
    """
    pair, is_other = divmod(draw, 2)
    tokens = np.flatnonzero(scored)
    block, size = np.unique(starts[tokens], return_inverse=True, return_counts=True)[1:]
    # Stratified over the pairs: u steps evenly through [0, 1) from a random place of each block.
    pairs = -(-draws // 2)
    shift = generator(seed, Purpose.CONTINUATION_COUNT, number).random(len(size))
    count = 1 + np.floor((shift + pair / pairs) % 1.0 * size).astype(np.int64)
    score = generator(seed, Purpose.CONTINUATION_MASK, number * pairs + pair).random(len(tokens))
    order = np.lexsort((score, block))
    place = np.arange(len(tokens)) - (np.cumsum(size) - size)[block[order]]
    chosen = np.empty(len(tokens), dtype=bool)
    chosen[order] = place >= (count - 1)[block[order]] if is_other else place < count[block[order]]
    count = size + 1 - count if is_other else count
    masked, weights = np.zeros(len(starts), dtype=bool), np.zeros(len(starts))
    masked[tokens] = chosen
    weights[tokens] = np.where(chosen, (size / count)[block], 0.0)
    return masked, weights
