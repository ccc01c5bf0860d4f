"""Which tokens are masked and at what rate: a function of (run seed, global sample index) alone.

Notation: t is the mask rate, the probability that a token is replaced by [MASK] (alpha_t = 1 - t). The
LLaDA2.0 report writes 1 - alpha_t for it in section 4 and alpha_t in section 5.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llada_megatron.attention.mask import block_starts
from llada_megatron.config.schema import DiffusionConfig, RatePer
from llada_megatron.parallel.random import Purpose, generator


@dataclass(frozen=True)
class Corruption:
    """masked bool [L]; rate float64 [L], the t that each position was masked with.

    group_starts int64 [L]: the first token of each one's noise group (attention/mask.py); None: of its block.
    """

    masked: np.ndarray
    rate: np.ndarray
    group_starts: np.ndarray | None = None


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
    rate is 1 - t. Empty masks are kept as they fall. cu_seqlens: int [documents + 1]; supervised: bool [L],
    the tokens that may be masked, None for all.
    """
    pair, is_complement = divmod(sample, 2) if diffusion.complementary else (sample, 0)
    length = int(cu_seqlens[-1])
    low, high = diffusion.mask_rate_min, diffusion.mask_rate_max
    draws = generator(seed, Purpose.MASK_RATE, pair)
    match diffusion.t_per:
        case RatePer.sequence:
            rate = np.full(length, draws.uniform(low, high))
        case RatePer.document:
            rate = np.repeat(draws.uniform(low, high, len(cu_seqlens) - 1), np.diff(cu_seqlens))
        case RatePer.block:
            starts = block_starts(cu_seqlens, block_size, diffusion.block_grid)
            rate = draws.uniform(low, high, length)[starts]
    masked = generator(seed, Purpose.MASK, pair).random(length) < rate
    if is_complement:
        masked, rate = ~masked, 1 - rate
    return Corruption(masked if supervised is None else masked & supervised, rate)
