"""Rules that fill masked positions and leave every other token alone.

Legend: m positions of the block, n of them masked, in rising order; k accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llada_megatron.config.ranges import Count, Share
from llada_megatron.generate.rules.seen import Change, Figures, Seen, filled


@dataclass(frozen=True)
class Filling:
    """A rule that fills masks by their proposed tokens."""

    figures = Figures.top_one
    edits = False


@dataclass(frozen=True)
class Threshold(Filling):
    """All with p > threshold, or the most probable one where there is none (LLaDA2.0, section 5.4).

    As SGLang's `low_confidence` does.
    """

    threshold: Share = 0.95

    def step(self, seen: Seen, state: Any) -> Change:
        return filled(seen, above(seen, self.threshold, 1))


@dataclass(frozen=True)
class Quota(Filling):
    """All with p > threshold if they are at least `need`, else the `need` most probable.

    need = m // steps, one more in the first m % steps forwards of the block. As `generate` of LLaDA2's Hugging Face
    code and the block refinement of diffusers do; with as many steps as positions it is `Threshold`.
    """

    threshold: Share = 0.95
    steps: Count = 0
    """Forwards of a block at most; 0: as many as it has positions."""

    def step(self, seen: Seen, state: Any) -> Change:
        m = len(seen.tokens_m)
        steps = self.steps or m
        need = m // steps + int(seen.step < m % steps)
        return filled(seen, above(seen, self.threshold, max(need, 1)))


def above(seen: Seen, threshold: float, need: int) -> np.ndarray:
    """int64 [k]: masked positions with p > threshold if they are at least `need`, else the `need` most probable."""
    masked_n = np.flatnonzero(seen.is_masked_m)
    accepted_k = masked_n[seen.probability_m[masked_n] > threshold]
    return accepted_k if len(accepted_k) >= need else most_probable(seen, masked_n, need)


def most_probable(seen: Seen, among_n: np.ndarray, count: int) -> np.ndarray:
    """int64 [min(count, n)]: the most probable ones, the first among equals."""
    return among_n[np.argsort(-seen.probability_m[among_n], kind="stable")[:count]]
