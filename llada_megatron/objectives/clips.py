"""Which mask rates leave a loss the least variance: BD3-LM's search over clips (arXiv 2503.09573, section 5).

Training draws a rate t ~ U[low, high], the clip, for each block and weighs the cross entropies of its masked
tokens by 1/t. Blocks are masked independently and do not see each other's masks, so the variances of their
losses over masks add up, and one set of draws with t ~ U[LEAST_RATE, 1] serves every clip: those of its draws
whose t lies within the clip are draws of that clip. BD3-LM's code draws anew for each.

Legend: D draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llada_megatron.config.errors import BadInput

LEAST_RATE = 1e-3
"""Of unclipped training, whose variance grows without a bound as it goes to 0."""
WIDTHS = tuple(round(0.05 * step, 2) for step in range(10, 19))
"""0.5 to 0.9, as BD3-LM searches."""


@dataclass(frozen=True)
class Clip:
    """Rates t ~ U[low, high], and the loss of a token under them."""

    low: float
    high: float
    variance: float
    """Of a sequence's mean loss per token over masks, nats^2."""
    mean: float
    """Nats per token; the bound itself for the widest clip alone."""


def grid() -> list[tuple[float, float]]:
    """No clip first, then every clip whose width is one of WIDTHS, in steps of 0.05."""
    clips = [(LEAST_RATE, 1.0)]
    for width in WIDTHS:
        lows = [step / 20 for step in range(round((1 - width) * 20) + 1)]
        clips += [(max(low, LEAST_RATE), round(low + width, 2)) for low in lows]
    return clips


def clips_of(rates: np.ndarray, losses: np.ndarray, tokens: Sequence[int]) -> list[Clip]:
    """The grid, from rates and losses float64 [D, blocks] and the scored tokens of each sequence.

    Raises BadInput where no block has two draws within a clip.
    """
    blocks, sequences = rates.shape[1], len(tokens)
    found = []
    for low, high in grid():
        mean, variance = of_blocks(losses, (rates >= low) & (rates <= high))
        if not len(variance):
            raise BadInput(f"{len(rates)} draws leave none within {low:g} to {high:g}: give more --draws.")
        of_sequence = variance.mean() * blocks / sequences
        per_token = mean.mean() * blocks / sum(tokens)
        found.append(Clip(low, high, float(of_sequence / np.mean(tokens) ** 2), float(per_token)))
    return found


def of_blocks(losses: np.ndarray, within: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and unbiased variances of the losses [D, blocks] that are `within`, of blocks with two or more.

    The others are as these on average: whether a block has two is chance alone.
    """
    count = within.sum(axis=0)
    mean = np.where(within, losses, 0).sum(axis=0) / np.maximum(count, 1)
    squares = np.where(within, (losses - mean) ** 2, 0).sum(axis=0)
    known = count > 1
    return mean[known], squares[known] / (count[known] - 1)


def best(clips: Sequence[Clip]) -> Clip:
    """The one of the least variance."""
    return min(clips, key=lambda clip: clip.variance)
