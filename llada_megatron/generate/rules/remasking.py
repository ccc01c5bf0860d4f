"""Rules that take decided tokens back: ReMDM (arXiv 2503.00307), on a linear grid of times, and WINO.

Legend: m positions of the block, k of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llada_megatron.config.ranges import Count, Positive, Share
from llada_megatron.generate.rules.seen import Change, Figures, Rule, Seen, above, most_probable


@dataclass(frozen=True)
class Remasking(Rule):
    """A block in `steps` forwards: each masks what is decided with probability sigma, and fills masks so that
    the expected share of tokens is what it is without masking again.

    Forward i of n goes from alpha_t = i / n to alpha_s = (i + 1) / n, the shares of tokens. With sigma at
    most sigma_max = min(1, (1 - alpha_s) / alpha_t), a mask is filled with probability
    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t). The last forward masks nothing and fills the rest; none
    before it is done, as what stands may be taken back.
    """

    steps: Count = 0
    """Forwards of a block; 0: as many as it has positions."""

    @property
    def edits(self) -> bool:
        return True

    def sigma(self, sigma_max: float, decided_p_m: np.ndarray) -> np.ndarray:
        """float64 [m]: with which probability a decided token is masked; what a mask has there counts in how
        it is filled.

        decided_p_m: float64 [m], the p that each token was decided with, infinite where none was.
        """
        raise NotImplementedError

    def decide(self, seen: Seen, state: np.ndarray | None) -> Change:
        """state: float64 [m], `decided_p_m`."""
        if not (seen.step or seen.is_masked_m.any()):  # there was never anything to fill
            return Change(seen.tokens_m.copy(), True)
        decided_p_m = np.full(len(seen.tokens_m), np.inf) if state is None else state
        steps = self.steps or len(seen.tokens_m)
        alpha_t, alpha_s = min(seen.step, steps - 1) / steps, min(seen.step + 1, steps) / steps
        sigma_m = self.sigma(min(1.0, (1 - alpha_s) / alpha_t) if alpha_t else 1.0, decided_p_m)
        fill_m = (alpha_s - (1 - sigma_m) * alpha_t) / (1 - alpha_t)
        positions = range(seen.first, seen.first + len(seen.tokens_m))
        draw_m = np.array([seen.draws.remasking(position, seen.step) for position in positions])
        is_last = alpha_s == 1
        is_filled_m = seen.is_masked_m & (is_last | (draw_m < fill_m))
        is_remasked_m = np.isfinite(decided_p_m) & (draw_m < sigma_m)
        tokens_m = np.where(is_filled_m, seen.choice_m, seen.tokens_m)
        tokens_m[is_remasked_m] = seen.mask_token_id
        decided_p_m = np.where(is_filled_m, seen.probability_m, decided_p_m)
        decided_p_m[is_remasked_m] = np.inf
        return Change(tokens_m, is_last, decided_p_m)


@dataclass(frozen=True)
class Capped(Remasking):
    """sigma = min(eta, sigma_max)."""

    eta: Share = 0.02

    def sigma(self, sigma_max: float, decided_p_m: np.ndarray) -> np.ndarray:
        return np.full(len(decided_p_m), min(self.eta, sigma_max))


@dataclass(frozen=True)
class Rescaled(Remasking):
    """sigma = eta sigma_max."""

    eta: Share = 0.02

    def sigma(self, sigma_max: float, decided_p_m: np.ndarray) -> np.ndarray:
        return np.full(len(decided_p_m), self.eta * sigma_max)


@dataclass(frozen=True)
class Unsure(Remasking):
    """sigma_i = sigma_max softmax(-p)_i over the decided tokens, p being what each was decided with; 0 for
    masks: one token a forward at most, as expected, and the less sure ones rather."""

    def sigma(self, sigma_max: float, decided_p_m: np.ndarray) -> np.ndarray:
        weight_m = np.exp(-decided_p_m)
        return sigma_max * weight_m / max(weight_m.sum(), np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class DraftVerify(Rule):
    """Fills all masks with p > threshold, or the most probable one, and masks what it then doubts again.

    WINO (arXiv 2507.18578), with the bounds of its public code. A token that stood before the forward is
    masked again where its probability, read by a row that does not see it, is below `verify_threshold`: none
    in a forward that fills a single mask, else fewer than the forward before filled. So after k forwards a
    block has k masks fewer than positions at least, and it is done in as many forwards as it has positions.
    What its last forward fills stays.
    """

    threshold: Share = 0.6
    verify_threshold: Share = 0.9
    draft_share: Share = 0.7
    """A forward fills no more than this share of the masks, or `draft_least` where those are more."""
    draft_least: Positive = 5
    draft_most: Positive = 20
    """A forward fills no more."""

    @property
    def figures(self) -> Figures:
        return Figures.label

    @property
    def edits(self) -> bool:
        return True

    @property
    def verifies(self) -> bool:
        return True

    def decide(self, seen: Seen, state: int | None) -> Change:
        """state: how many masks the last forward filled."""
        assert seen.verified_m is not None
        masks = int(seen.is_masked_m.sum())
        bound = min(max(int(masks * self.draft_share), self.draft_least), self.draft_most)
        filled_k = most_probable(seen, above(seen, self.threshold, 1))[:bound]
        tokens_m = seen.tokens_m.copy()
        tokens_m[filled_k] = seen.choice_m[filled_k]
        doubted_k = np.flatnonzero(seen.verified_m < self.verify_threshold)
        allowed = len(tokens_m) if state is None else max(state - 1, 0)
        if len(filled_k) > 1:
            order_k = doubted_k[np.argsort(seen.verified_m[doubted_k], kind="stable")]
            tokens_m[order_k[:allowed]] = seen.mask_token_id
        is_done = not ((tokens_m == seen.mask_token_id) & ~seen.is_prompt_m).any()
        return Change(tokens_m, is_done, len(filled_k))
