"""Several blocks at once: the masked tokens of a noise group, given the clean text before it (MultiTF).

A noise group is a run of neighbouring blocks of a document; a noisy token sees its group up to its own block,
noisy, and the clean text before the group (attention/mask.py). So a model learns what decoding several blocks
at a time asks of it: the blocks before its own are unfinished (MBD-LMs, arXiv 2606.29215, algorithm 1).

Samples in a row read one sequence under one layout of groups each. The loss is that of objective `diffusion`.

Legend: L data tokens of a sequence, K its blocks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llada_megatron.attention.mask import block_starts
from llada_megatron.config.choices import GroupRates
from llada_megatron.config.multi_block import GroupLayout
from llada_megatron.config.schema import DiffusionConfig
from llada_megatron.objectives.corruption import Corruption, corrupt
from llada_megatron.objectives.diffusion import Diffusion
from llada_megatron.parallel.random import Purpose, generator


def corrupt_in_groups(
    seed: int,
    sample: int,
    cu_seqlens: np.ndarray,
    block_size: int,
    diffusion: DiffusionConfig,
    supervised: np.ndarray | None = None,
) -> Corruption:
    """The masks and the noise groups of a sample.

    Rates of `chain` rise within a group, and of a block with rate t, floor(t m) of its m maskable tokens are
    masked; `rate` is then the share that was masked. Rates of `independent` are those of `corrupt`.
    cu_seqlens: int [documents + 1]; supervised: bool [L], the tokens that may be masked, None for all.
    """
    settings = diffusion.multi_block
    starts_L = block_starts(cu_seqlens, block_size, diffusion.block_grid)
    layout = settings.layouts[sample % len(settings.layouts)]
    draws = generator(seed, Purpose.NOISE_GROUPS, sample)
    groups_L = group_starts(cu_seqlens, starts_L, layout, settings.group_size, draws)
    if settings.rates is GroupRates.independent:
        return replace(
            corrupt(seed, sample, cu_seqlens, block_size, diffusion, supervised), group_starts=groups_L
        )
    low, high = diffusion.mask_rate_min, diffusion.mask_rate_max
    firsts_K, block_L = np.unique(starts_L, return_inverse=True)
    rate_K = chain_rates(
        groups_L[firsts_K],
        low,
        high - settings.rate_margin * (high - low),
        generator(seed, Purpose.MASK_RATE, sample),
    )
    maskable_L = np.ones(len(starts_L), dtype=bool) if supervised is None else supervised
    tokens_K = np.bincount(block_L, maskable_L)
    masked_K = np.floor(rate_K * tokens_K)
    # The maskable tokens of each block in random order, of which the first ones are masked.
    random_L = generator(seed, Purpose.MASK, sample).random(len(starts_L))
    order = np.lexsort((random_L, ~maskable_L, block_L))
    masked_L = np.empty(len(starts_L), dtype=bool)
    masked_L[order] = np.arange(len(starts_L)) - firsts_K[block_L] < masked_K[block_L]
    share_K = np.divide(masked_K, tokens_K, out=np.zeros_like(rate_K), where=tokens_K > 0)
    return Corruption(masked_L, share_K[block_L], groups_L)


def group_starts(
    cu_seqlens: np.ndarray,
    block_start_L: np.ndarray,
    layout: GroupLayout,
    largest: int,
    draws: np.random.Generator,
) -> np.ndarray:
    """First token of each token's noise group, int64 [L]; groups begin anew with each document.

    The layout (size, shift) has one group of `shift` blocks before those of `size`; None draws sizes from
    2..largest. A document ends its last group.
    """
    firsts_K = np.unique(block_start_L)
    begins = []
    for blocks in np.diff(np.searchsorted(firsts_K, cu_seqlens)).tolist():  # of each document
        place = np.arange(blocks)
        if layout is None:
            edges = np.cumsum(draws.integers(2, largest + 1, blocks))
            begins.append((place == 0) | np.isin(place, edges))
        else:
            size, shift = layout
            begins.append((place == 0) | (place % size == shift))
    is_first_K = np.concatenate(begins)
    group_K = np.maximum.accumulate(np.where(is_first_K, firsts_K, 0))
    return group_K[np.searchsorted(firsts_K, block_start_L)]


def chain_rates(group_K: np.ndarray, low: float, high: float, draws: np.random.Generator) -> np.ndarray:
    """Chain-uniform rates float64 [K] of blocks, which rise within each group: step 2 of algorithm 1.

    floor ~ U(low, high); t of each block in turn ~ U(floor, high), and is the floor of the next one. So the
    distance from `high` shrinks by one more uniform factor at each block. group_K tells the groups apart.
    """
    K = len(group_K)
    is_first = np.diff(group_K, prepend=-1) != 0
    place = np.arange(K) - np.maximum.accumulate(np.where(is_first, np.arange(K), 0))
    floors, factors = 1 - draws.random(K), 1 - draws.random(K)
    left = np.where(is_first, floors * factors, factors)
    for step in range(1, int(place.max()) + 1):
        (here,) = np.nonzero(place == step)
        left[here] *= left[here - 1]
    return high - (high - low) * left


class MultiBlock(Diffusion):
    """The diffusion loss of blocks that see unfinished ones."""

    corrupt = staticmethod(corrupt_in_groups)


OBJECTIVE = MultiBlock
