"""LLaDA2.2's rule: besides filling and editing it deletes tokens and makes room for new ones.

Legend: m positions of the block, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llada_megatron.config.errors import BadInput
from llada_megatron.config.ranges import Count, Extent, Share
from llada_megatron.generate.rules.editing import edited
from llada_megatron.generate.rules.seen import Change, Figures, Rule, Seen, above, proposed, without


@dataclass(frozen=True)
class Revised:
    """What a block has been through."""

    is_original_m: np.ndarray
    """bool: was masked at the start; moves with its token. Other masks were put in by the rule."""
    updates: int = 0
    post_edits: int = 0
    """Forwards without an original mask; never set back."""
    blocks: frozenset[tuple[int, ...]] = frozenset()
    """Every block that a forward has read."""
    tried: frozenset[tuple[int, int]] = frozenset()
    """(position in the block, token) of all that was written."""


@dataclass(frozen=True)
class InDel(Rule):
    """LLaDA2.1's joint threshold with two tokens that are orders: delete this position, split it.

    SGLang's `joint_threshold_indel`, which is the public statement of LLaDA2.2's decoding. A split of
    position i puts a mask before the token that stands there; the block keeps its length, by masks at its end
    or by what falls off there, and given tokens stay. As long as original masks remain, one more mask is
    filled than was put in; after max_post_edits forwards without any, or m + max_post_edits forwards at all,
    a last one fills everything with ordinary tokens. A block that was there before gets another token at its
    least sure change. Unlike under other rules a mask may take the place of a token, though not of an
    original mask.
    """

    threshold: Share = 0.5
    edit_threshold: Share = 0.0
    max_post_edits: Count = 16
    delete_id: Extent = 156930
    """Its token in the tokenizer of LLaDA2.2."""
    split_id: Extent = 156931

    @property
    def figures(self) -> Figures:
        return Figures.logits

    @property
    def edits(self) -> bool:
        return True

    def read(self, seen: Seen, state: Any) -> tuple[Seen, Any]:
        assert seen.logits_mV is not None
        choice_m, probability_m = proposed(seen.logits_mV)
        return replace(seen, choice_m=choice_m, probability_m=probability_m), state

    def decide(self, seen: Seen, state: Revised | None) -> Change:
        self._check(seen)
        state = state or Revised(seen.is_masked_m)
        is_open_m = state.is_original_m & seen.is_masked_m
        updates, post_edits = state.updates + 1, state.post_edits + int(not is_open_m.any())
        is_last = post_edits >= max(self.max_post_edits, 1) or updates > len(is_open_m) + self.max_post_edits
        if not is_last:
            seen = _without_mask(seen, is_open_m)
        is_filled_m = seen.is_masked_m.copy()
        if is_open_m.any() and not is_last:
            need = 1 + int((seen.is_masked_m & ~is_open_m).sum())
            is_filled_m[:] = False
            is_filled_m[above(seen, self.threshold, need)] = True
            if not self.max_post_edits and not (is_open_m & ~is_filled_m).any():
                is_last, is_filled_m = True, seen.is_masked_m
        is_written_m = is_filled_m | edited(seen, self.edit_threshold)
        if not is_written_m.any():
            return Change(seen.tokens_m.copy(), True, state)
        before = tuple(seen.tokens_m.tolist())
        if is_last:
            choice_m = self._ordinary(seen)
        elif before in state.blocks:
            choice_m = _another(seen, is_written_m, is_open_m, state.tried)
        else:
            choice_m = seen.choice_m
        tokens_m, is_original_m = self._revised(seen, is_written_m, choice_m, state.is_original_m)
        written = np.flatnonzero(is_written_m).tolist()
        state = Revised(
            is_original_m,
            updates,
            post_edits,
            state.blocks | {before},
            state.tried | {(position, int(choice_m[position])) for position in written},
        )
        return Change(tokens_m, is_last, state)

    def _ordinary(self, seen: Seen) -> np.ndarray:
        """The choice [m] without orders and masks."""
        assert seen.logits_mV is not None
        orders = [seen.mask_token_id, self.delete_id, self.split_id]
        ordinary_m, _ = proposed(seen.logits_mV, *orders)
        return np.where(np.isin(seen.choice_m, orders), ordinary_m, seen.choice_m)

    def _revised(
        self, seen: Seen, is_written_m: np.ndarray, choice_m: np.ndarray, is_original_m: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The block and its flags after everything written is obeyed."""
        tokens: list[int] = []
        flags: list[bool] = []
        for old, new, is_written, flag in zip(
            seen.tokens_m.tolist(), choice_m.tolist(), is_written_m, is_original_m, strict=True
        ):
            if is_written and new == self.split_id:
                tokens += [seen.mask_token_id, old]
                flags += [False, flag]
            elif not (is_written and new == self.delete_id):
                tokens.append(new if is_written else old)
                flags.append(flag)
        m = len(is_written_m)
        missing = max(m - len(tokens), 0)
        tokens_m = np.array(tokens[:m] + [seen.mask_token_id] * missing, dtype=np.int64)
        return tokens_m, np.array(flags[:m] + [False] * missing, dtype=bool)

    def _check(self, seen: Seen) -> None:
        if len({self.delete_id, self.split_id, seen.mask_token_id}) < 3:
            raise BadInput(
                f"Rule indel has delete_id {self.delete_id} and split_id {self.split_id} beside the mask"
                f" token {seen.mask_token_id}: give three different tokens."
            )
        if (np.diff(seen.is_prompt_m.astype(int)) > 0).any():
            raise BadInput("Rule indel moves tokens: give a prompt without holes, or another rule.")


def _without_mask(seen: Seen, is_open_m: np.ndarray) -> Seen:
    """No original mask is filled with a mask, or it would stay one."""
    assert seen.logits_mV is not None
    other_m, p_m = proposed(seen.logits_mV, seen.mask_token_id)
    is_other_m = is_open_m & (seen.choice_m == seen.mask_token_id)
    return replace(
        seen,
        choice_m=np.where(is_other_m, other_m, seen.choice_m),
        probability_m=np.where(is_other_m, p_m, seen.probability_m),
    )


def _another(
    seen: Seen, is_written_m: np.ndarray, is_open_m: np.ndarray, tried: frozenset[tuple[int, int]]
) -> np.ndarray:
    """The choice [m] with a token that was never written there at the least sure change."""
    assert seen.logits_mV is not None
    changing_k = np.flatnonzero(is_written_m & (seen.choice_m != seen.tokens_m))
    if not len(changing_k):
        return seen.choice_m
    position = int(changing_k[seen.probability_m[changing_k].argmin()])
    hidden = [token for place, token in tried if place == position]
    hidden += [seen.mask_token_id] if is_open_m[position] else []
    choice_m = seen.choice_m.copy()
    choice_m[position] = without(seen.logits_mV[position : position + 1], *hidden).argmax()
    return choice_m
