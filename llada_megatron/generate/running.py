"""A prompt that is being decoded: its tokens, its active block, and how much of it a cache holds.

Everything but the pages is a function of the forwards so far, so a prompt whose pages are taken away loses
nothing: what they held is computed again from its tokens.

Legend: T tokens of the sequence with room for what is generated, m positions of the active block, C figures
per row.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from llada_megatron.config.errors import BadInput
from llada_megatron.generate import pages
from llada_megatron.generate.prompt import BlockChanged, Limits, Prompt, Result, Stop
from llada_megatron.generate.rules import Change, Draws, Rule, Seen, figures_of

Text = Callable[[list[int]], str]


class Running:
    """One sequence; blocks of `block_size` count from its first token.

    Raises BadInput for a prompt that the model cannot go on from.
    """

    def __init__(
        self,
        number: int,
        prompt: Prompt,
        limits: Limits,
        *,
        block_size: int,
        mask_token_id: int,
        context: int,
    ) -> None:
        given = np.asarray(prompt.tokens, np.int64)
        self.number, self.limits = number, limits
        self.block_size, self.mask_token_id = block_size, mask_token_id
        self.has_holes, self.given = prompt.has_holes, len(given)
        context -= context % block_size
        room = context - len(given)
        if room < 0 or (room == 0 and limits.new_tokens):
            raise BadInput(
                f"Prompt {number} has {len(given)} tokens, and the model's context of {context} has no room"
                " for more: shorten it, or raise data.sequence_length if the model reads further."
            )
        masks = np.flatnonzero(given == mask_token_id)
        if len(masks) and not prompt.has_holes:
            raise BadInput(
                f"Prompt {number} holds the mask token, {mask_token_id}, at position {masks[0]}: remove it."
            )
        self.wanted = len(given) + min(limits.new_tokens, room)
        self.is_cut = limits.new_tokens > room
        length = -(-self.wanted // block_size) * block_size if limits.new_tokens else len(given)
        self.tokens = np.full(length, mask_token_id, np.int64)
        self.tokens[: len(given)] = given
        self.is_given = self.tokens != mask_token_id
        draft = np.asarray(prompt.draft, np.int64)
        if len(draft) > self.wanted - len(given):
            raise BadInput(
                f"Prompt {number} has a draft of {len(draft)} tokens, and {self.wanted - len(given)} new ones"
                " are wanted: ask for more, or shorten it."
            )
        self.tokens[len(given) : len(given) + len(draft)] = draft
        self.decided_at = np.zeros(length, np.int64)
        self.is_edited = np.zeros(length, bool)
        self.forwards: Counter[str] = Counter()
        self.began = 0.0
        self.first = self.stop = 0
        self.pages: list[int] = []
        self.kept = 0
        self._digests: list[bytes] = []
        self._state: Any = None
        self._looked_at = 0
        self._activate(0)

    @property
    def largest(self) -> int:
        """Pages that the whole sequence takes."""
        return -(-len(self.tokens) // self.block_size)

    @property
    def is_filled(self) -> bool:
        """No block is active: nothing is left to be decided."""
        return self.first == self.stop

    @property
    def is_masked(self) -> np.ndarray:
        """bool [m]: where the active block has no token yet."""
        block = slice(self.first, self.stop)
        return (self.tokens[block] == self.mask_token_id) & ~self.is_given[block]

    def digest(self, block: int) -> bytes:
        """Of the tokens up to the end of a block before the active one."""
        while len(self._digests) <= block:
            before = self._digests[-1] if self._digests else pages.START
            at = len(self._digests) * self.block_size
            self._digests.append(pages.prefix(before, self.tokens[at : at + self.block_size]))
        return self._digests[block]

    def places(self, stop: int) -> np.ndarray:
        """int64 [stop]: where the keys of the tokens before `stop` are kept."""
        pages_of_tokens = np.array(self.pages[: -(-stop // self.block_size)], np.int64)[:, None]
        return (pages_of_tokens * self.block_size + np.arange(self.block_size)).reshape(-1)[:stop]

    def rows_read(self, rule: Rule) -> np.ndarray:
        """Positions whose figures the rule reads: the masked ones, or all that are not given."""
        return self.first + np.flatnonzero(
            ~self.is_given[self.first : self.stop] if rule.edits else self.is_masked
        )

    def step(self, rule: Rule, rows: np.ndarray, output: np.ndarray, seed: int) -> tuple[BlockChanged, bool]:
        """Apply the rule to what the head said of `rows`, [rows, C].

        Returns what became of the block, and whether the keys that this forward wrote for it are final.
        """
        figures = np.zeros((self.stop - self.first, output.shape[1]), output.dtype)
        figures[rows - self.first] = output
        block = slice(self.first, self.stop)
        seen = Seen(
            self.tokens[block].copy(),
            self.is_given[block],
            self.is_masked,
            **figures_of(rule.figures, figures, self.mask_token_id),
            step=self._step,
            first=self.first,
            mask_token_id=self.mask_token_id,
            draws=Draws(seed, self.number),
        )
        change: Change = rule.step(seen, self._state)
        self.tokens[block], self._state = change.tokens_m, change.state
        self._step += 1
        self.forwards["denoise"] += 1
        is_other = change.tokens_m != seen.tokens_m
        self.decided_at[block][is_other] = self.forwards["denoise"]
        self.is_edited[block] |= is_other & (seen.tokens_m != self.mask_token_id)
        changed = BlockChanged(self.number, self.first, change.tokens_m, self.is_masked, change.is_done)
        return changed, change.is_done and not change.changes(seen)

    def next_block(self) -> None:
        """The active block is done: the next one that is not given as a whole becomes active, if any is
        left."""
        self._activate(self.stop)

    def _activate(self, at: int) -> None:
        holes = np.flatnonzero(~self.is_given[at:])
        self.first = (
            (at + int(holes[0])) // self.block_size * self.block_size if len(holes) else len(self.tokens)
        )
        self.stop = min(self.first + self.block_size, len(self.tokens))
        self._step, self._state = 0, None

    def ended(self, changed: BlockChanged, rule: Rule, text: Text | None) -> Result | None:
        """The result, if this change of the active block ends the sequence."""
        decided = changed.first + int(np.append(np.flatnonzero(changed.is_masked), len(changed.tokens))[0])
        stays = changed.is_done or not rule.edits  # what stands in front of the first mask
        if stays and decided > self._looked_at:
            behind, ahead = max(self.given, changed.first), min(decided, self.wanted)
            ends = np.isin(self.tokens[behind:ahead], list(self.limits.end_tokens))
            if ends.any():
                return self._result(behind + int(ends.argmax()) + 1, Stop.end, text)
            if found := self._stop_string(ahead, text):
                return self._result(*found)
            self._looked_at = decided
        is_last = self.is_given[self.stop : self.wanted].all()
        if is_last and (changed.is_done or (stays and decided >= self.wanted)):
            reason = Stop.context if self.is_cut else Stop.length
            return self._result(min(self.wanted, len(self.tokens)), reason, text)
        if self.limits.forwards and self.forwards.total() >= self.limits.forwards:
            return self._result(min(decided, self.wanted), Stop.forwards, text)
        return None

    def untouched(self, text: Text | None) -> Result:
        """The result of a prompt without anything to fill."""
        return self._result(len(self.tokens), Stop.length, text)

    def _stop_string(self, stop: int, text: Text | None) -> tuple[int, Stop, Text, int] | None:
        """Where the first stop string ends in tokens, and where it begins in the text's characters."""
        if text is None or not self.limits.strings:
            return None
        generated = self.tokens[self.given : stop].tolist()
        whole = text(generated)
        if not any(string in whole for string in self.limits.strings):
            return None
        few, enough = 0, len(generated)  # the fewest tokens whose text holds a string
        while few < enough:
            middle = (few + enough) // 2
            part = text(generated[:middle])
            if any(string in part for string in self.limits.strings):
                enough = middle
            else:
                few = middle + 1
        held = text(generated[:enough])
        first = min(at for string in self.limits.strings if (at := held.find(string)) >= 0)
        return self.given + enough, Stop.string, text, first

    def _result(self, stop: int, reason: Stop, text: Text | None, characters: int | None = None) -> Result:
        first = 0 if self.has_holes else self.given
        tokens = self.tokens[first:stop].copy()
        return Result(
            self.number,
            tokens,
            None if text is None else text(tokens.tolist())[:characters],
            reason,
            self.decided_at[first:stop].copy(),
            self.is_edited[first:stop].copy(),
            {kind: self.forwards[kind] for kind in ("prefill", "denoise", "store")},
            int((~self.is_given[first:stop]).sum()),
            time.perf_counter() - self.began,
        )
