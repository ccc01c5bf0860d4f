"""Rules that also change tokens that stand already.

Legend: m positions of the block, k of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llada_megatron.config.ranges import Amount, Count, Positive, Share
from llada_megatron.generate.rules.seen import Change, Figures, Rule, Seen, above, proposed


@dataclass(frozen=True)
class JointThreshold(Rule):
    """Fills masks with p > threshold, and puts another token where its p > edit_threshold.

    LLaDA2.1 (arXiv 2602.08676). Of the masks at least `at_least` are filled. Done when a forward without
    masks changes nothing, or after max_post_edits forwards without masks; a block of nothing but tokens may
    still change. Defaults are SGLang's `joint_threshold`; the sampler of dllm has 0.95, 0.9, 16 and
    num_to_transfer 1. SGLang runs one forward more where the limit ends the block, which changes nothing.
    """

    threshold: Share = 0.5
    edit_threshold: Share = 0.0
    max_post_edits: Count = 16
    at_least: Positive = 1
    penalty_lambda: Amount = 0.0
    """Taken from the logit of the left neighbour's token, within the block."""

    @property
    def figures(self) -> Figures:
        return Figures.logits if self.penalty_lambda else Figures.top_one

    @property
    def edits(self) -> bool:
        return True

    def read(self, seen: Seen, state: Any) -> tuple[Seen, Any]:
        if not self.penalty_lambda:
            return seen, state
        assert seen.logits_mV is not None
        logits_mV = seen.logits_mV.copy()
        logits_mV[np.arange(1, len(logits_mV)), seen.tokens_m[:-1]] -= self.penalty_lambda
        choice_m, probability_m = proposed(logits_mV, seen.mask_token_id)
        read = replace(seen, choice_m=choice_m, probability_m=probability_m, logits_mV=logits_mV)
        return read, state

    def decide(self, seen: Seen, state: int | None) -> Change:
        """state: forwards without masks."""
        post_edits = (state or 0) + int(not seen.is_masked_m.any())
        is_filled_m = np.zeros_like(seen.is_masked_m)
        is_filled_m[above(seen, self.threshold, self.at_least)] = True
        is_edited_m = edited(seen, self.edit_threshold)
        tokens_m = np.where(is_filled_m | is_edited_m, seen.choice_m, seen.tokens_m)
        is_left = (seen.is_masked_m & ~is_filled_m).any()
        is_still = not (seen.is_masked_m.any() or is_edited_m.any())
        return Change(tokens_m, is_still or (not is_left and post_edits >= self.max_post_edits), post_edits)


@dataclass(frozen=True)
class Soft(Rule):
    """Fills masks with p > threshold, or the most probable one, and proposes every other token anew.

    Soft parallel decoding (DMax, arXiv 2604.08302): where a token stands the next forward reads
    p E[token] + (1 - p) E[mask], at the norm of that mean. Done without masks when nothing changes or every
    p >= confident_at, or after `steps` forwards, the last of which fills everything. For models that were
    trained on their own predictions (DMax's OPUT); others have never read such embeddings.
    """

    threshold: Share = 0.5
    confident_at: Share = 0.9
    steps: Count = 0
    """Forwards of a block at most; 0: as many as it has positions."""
    from_left: bool = False
    """As the public code: only masks in front of the first one with p < threshold, or the first one."""

    @property
    def edits(self) -> bool:
        return True

    def decide(self, seen: Seen, state: int | None) -> Change:
        """state: forwards in which the block had to fill."""
        forwards = (state or 0) + seen.at_least(1)
        is_last = forwards >= (self.steps or len(seen.tokens_m))
        is_filled_m = np.zeros_like(seen.is_masked_m)
        is_filled_m[np.flatnonzero(seen.is_masked_m) if is_last else self._accepted(seen)] = True
        is_left_m = seen.is_masked_m & ~is_filled_m
        is_soft_m = ~seen.is_prompt_m & ~is_left_m
        tokens_m = np.where(is_soft_m, seen.choice_m, seen.tokens_m)
        is_sure = (seen.probability_m[is_soft_m] >= self.confident_at).all()
        is_still = is_sure or np.array_equal(tokens_m, seen.tokens_m)
        is_done = bool(is_last or (is_still and not is_left_m.any()))
        return Change(tokens_m, is_done, forwards, np.where(is_soft_m, seen.probability_m, 1.0))

    def _accepted(self, seen: Seen) -> np.ndarray:
        """int64 [k]: masks to be filled."""
        if not self.from_left:
            return above(seen, self.threshold, 1)
        masked_n = np.flatnonzero(seen.is_masked_m)
        unsure = np.flatnonzero(seen.probability_m[masked_n] < self.threshold)
        return masked_n[: max(unsure[0], seen.at_least(1))] if len(unsure) else masked_n


def edited(seen: Seen, edit_threshold: float) -> np.ndarray:
    """bool [m]: neither given nor masked, and the model is surer than edit_threshold of another token."""
    is_other_m = (seen.choice_m != seen.tokens_m) & (seen.probability_m > edit_threshold)
    return is_other_m & ~seen.is_masked_m & ~seen.is_prompt_m
