"""Which tokens are masked and at what rate: a function of (run seed, global sample index) alone.

Notation: t is the mask rate, the probability that a token is replaced by [MASK] (alpha_t = 1 - t). The
LLaDA2.0 report writes 1 - alpha_t for it in section 4 and alpha_t in section 5.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llada_megatron.attention.mask import block_starts
from llada_megatron.config.schema import DiffusionConfig, RatePer
from llada_megatron.parallel.random import Purpose, generator

UNCLIPPED_RATE = 1e-3
"""A least rate up to this keeps 1/t finite and clips nothing: blocks with no masked token stay."""


@dataclass(frozen=True)
class Corruption:
    """masked bool [L]; rate float64 [L], the t that each position was masked with."""

    masked: np.ndarray
    rate: np.ndarray


def corrupt(
    seed: int,
    sample: int,
    cu_seqlens: np.ndarray,
    block_size: int,
    diffusion: DiffusionConfig,
    supervised: np.ndarray | None = None,
) -> Corruption:
    """Draw t ~ U[mask_rate_min, mask_rate_max] per sequence, document or block, then mask each token with t.

    With `complementary`, samples 2j and 2j+1 are one sequence masked with m and with its complement, whose
    rate is 1 - t. Empty masks are kept as they fall, but with `resample`. cu_seqlens: int [documents + 1];
    supervised: bool [L], the tokens that may be masked, None for all.
    """
    pair, is_complement = divmod(sample, 2) if diffusion.complementary else (sample, 0)
    length = int(cu_seqlens[-1])
    block_start = block_starts(cu_seqlens, block_size, diffusion.block_grid)
    rate = _rates(generator(seed, Purpose.MASK_RATE, pair), cu_seqlens, block_start, diffusion)
    draws = generator(seed, Purpose.MASK, pair)
    masked = draws.random(length) < rate
    maskable = np.ones(length, dtype=bool) if supervised is None else supervised
    if diffusion.resample:
        clip = diffusion.mask_rate_min, diffusion.mask_rate_max
        masked = resampled(masked, lambda: draws.random(length) < rate, block_start, maskable, clip)
    if is_complement:
        masked, rate = ~masked, 1 - rate
    return Corruption(masked & maskable, rate)


def _rates(
    draws: np.random.Generator, cu_seqlens: np.ndarray, block_start_L: np.ndarray, diffusion: DiffusionConfig
) -> np.ndarray:
    """float64 [L]."""
    low, high, lengths = diffusion.mask_rate_min, diffusion.mask_rate_max, np.diff(cu_seqlens)
    if diffusion.antithetic:
        start = block_start_L if diffusion.t_per is RatePer.block else np.repeat(cu_seqlens[:-1], lengths)
        firsts, part_L = np.unique(start, return_inverse=True)
        spread = spread_evenly(draws.random(len(firsts)), int(draws.integers(len(firsts))))
        return (low + (high - low) * spread)[part_L]
    match diffusion.t_per:
        case RatePer.sequence:
            return np.full(len(block_start_L), draws.uniform(low, high))
        case RatePer.document:
            return np.repeat(draws.uniform(low, high, len(lengths)), lengths)
        case RatePer.block:
            return draws.uniform(low, high, len(block_start_L))[block_start_L]


def spread_evenly(uniform_N: np.ndarray, shift: int = 0) -> np.ndarray:
    """N numbers of [0, 1), one in each of N equal parts: number i in part i + shift, around the end.

    BD3-LM (arXiv 2503.09573) shifts by nothing, so that later blocks have higher rates; with a shift drawn
    from 0..N-1 each of them is uniform, and the bound of every block is estimated without bias.
    """
    N = len(uniform_N)
    return ((np.arange(N) + shift) % N + uniform_N) / N


def resampled(
    masked_L: np.ndarray,
    draw: Callable[[], np.ndarray],
    block_start_L: np.ndarray,
    maskable_L: np.ndarray,
    clip: tuple[float, float],
) -> np.ndarray:
    """The mask bool [L], blocks drawn again until the share of each that is masked lies within the clip.

    draw: a mask of all L. Shares are of the maskable tokens; a block of which no number lies within stays as
    it falls. A bound that clips nothing, up to UNCLIPPED_RATE or 1, is not asked for.
    """
    low, high = clip[0] if clip[0] > UNCLIPPED_RATE else 0.0, clip[1]
    _, block_L = np.unique(block_start_L, return_inverse=True)
    tokens = np.bincount(block_L, maskable_L)
    least, most = np.ceil(low * tokens - 1e-9), np.floor(high * tokens + 1e-9)
    while True:
        count = np.bincount(block_L, masked_L & maskable_L)
        again = ((count < least) | (count > most)) & (least <= most)
        if not again.any():
            return masked_L
        masked_L = np.where(again[block_L], draw(), masked_L)
