"""A prompt that is being decoded: its tokens, its active blocks, and how much of it a cache holds.

Everything but the pages is a function of the forwards so far, so a prompt whose pages are taken away loses
nothing: what they held is computed again from its tokens.

Legend: T tokens of the sequence with room for what is generated, m positions of a block, n rows that are
read, C figures per row.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from llada_megatron.config.errors import BadInput
from llada_megatron.generate import pages
from llada_megatron.generate.branches import Block, Branch, Lookahead
from llada_megatron.generate.buffer import Buffer
from llada_megatron.generate.methods import Method
from llada_megatron.generate.prompt import BlockChanged, Limits, Prompt, Result, Stop
from llada_megatron.generate.rules import Draws, Rule, Seen, figures_of, label_probability

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
        tokens = np.full(length, mask_token_id, np.int64)
        tokens[: len(given)] = given
        self.is_given = tokens != mask_token_id
        draft = np.asarray(prompt.draft, np.int64)
        if len(draft) > self.wanted - len(given):
            raise BadInput(
                f"Prompt {number} has a draft of {len(draft)} tokens, and {self.wanted - len(given)} new ones"
                " are wanted: ask for more, or shorten it."
            )
        tokens[len(given) : len(given) + len(draft)] = draft
        self.anchor = Branch(tokens, [])
        """The sequence as it has been decided so far."""
        self.lookahead: list[Branch] = []
        """Others that the next forward reads as well, the surest first."""
        self.weights = np.ones(length, np.float32)  # of tokens in their embeddings, see Change.weight_m
        self.decided_at = np.zeros(length, np.int64)
        self.is_edited = np.zeros(length, bool)
        self.forwards: Counter[str] = Counter()
        self.began = 0.0
        self.pages: list[int] = []
        self.pages_beside: list[list[int]] = []
        """Where the active blocks of further branches on this rank, or of a shadow, are kept meanwhile."""
        self.kept = 0
        self._digests: list[bytes] = []
        self._looked_at = 0
        self._activate(0)

    @property
    def largest(self) -> int:
        """Pages that the whole sequence takes."""
        return -(-len(self.tokens) // self.block_size)

    @property
    def tokens(self) -> np.ndarray:
        """int64 [T], the mask token where nothing is decided."""
        return self.anchor.tokens

    @property
    def first(self) -> int:
        """Where the active blocks begin."""
        return self.anchor.first

    @property
    def before(self) -> int:
        """The tokens in front of the rows that a forward has to read for the rule."""
        return self.first

    @property
    def branches(self) -> list[Branch]:
        """What the next forward reads, the anchor last."""
        return [*self.lookahead, self.anchor]

    @property
    def stop(self) -> int:
        """Where the active blocks of the branch that reaches furthest end."""
        return max(branch.stop for branch in self.branches)

    @property
    def is_filled(self) -> bool:
        """No block is active: nothing is left to be decided."""
        return not self.anchor.blocks

    def digest(self, block: int) -> bytes:
        """Of the tokens up to the end of a block before the active one."""
        while len(self._digests) <= block:
            before = self._digests[-1] if self._digests else pages.START
            at = len(self._digests) * self.block_size
            self._digests.append(pages.prefix(before, self.tokens[at : at + self.block_size]))
        return self._digests[block]

    def places(self, stop: int, beside: int | None = None) -> np.ndarray:
        """int64 [stop]: where the keys of the tokens before `stop` are kept.

        beside: those of the active blocks in that one of `pages_beside`.
        """
        in_order = self.pages
        if beside is not None:
            in_order = self.pages[: self.first // self.block_size] + self.pages_beside[beside]
        pages_of_tokens = np.array(in_order[: -(-stop // self.block_size)], np.int64)[:, None]
        return (pages_of_tokens * self.block_size + np.arange(self.block_size)).reshape(-1)[:stop]

    def is_masked(self, branch: Branch) -> np.ndarray:
        """bool [T]: where a branch has no token yet."""
        return (branch.tokens == self.mask_token_id) & ~self.is_given

    def rows_read(self, branch: Branch, rule: Rule) -> np.ndarray:
        """Positions of its active blocks that are read: the masked ones, or all that are not given."""
        is_read = ~self.is_given if rule.edits else self.is_masked(branch)
        rows = [
            block.start + np.flatnonzero(is_read[block.start : block.stop])
            for block in branch.blocks
            if not block.is_done
        ]
        return np.concatenate([*rows, np.zeros(0, np.int64)])

    def shadows(self, rule: Rule) -> list[tuple[Block, np.ndarray]]:
        """The active blocks that a forward shadows, with the positions, int64 [n], that stand to be verified.

        Those of the anchor: a rule that verifies edits, and so has no other branch.
        """
        if not rule.verifies:
            return []
        stands = (self.tokens != self.mask_token_id) & ~self.is_given
        active = [block for block in self.anchor.blocks if not block.is_done]
        found = [(each, each.start + np.flatnonzero(stands[each.start : each.stop])) for each in active]
        return [(block, rows) for block, rows in found if len(rows)]

    def read_rows(self, rule: Rule) -> list[np.ndarray]:
        """The positions that the next forward's head says something of: of each branch, then each shadow."""
        branches = [self.rows_read(branch, rule) for branch in self.branches]
        return branches + [rows for _, rows in self.shadows(rule)]

    def step(self, method: Method, outputs: list[np.ndarray], seed: int) -> tuple[BlockChanged, int]:
        """Go on with the branch that wins, by what the head said of `read_rows`, [n, C] each.

        Returns what became of its active blocks, and the position up to which the keys that this forward
        wrote are final.
        """
        rule, lookahead = method.rule, method.lookahead
        of_branches, of_shadows = outputs[: len(self.branches)], outputs[len(self.branches) :]
        verified = self._verified(rule, of_shadows) if rule.verifies else None
        said = self.said(method, of_branches)
        best = int(np.argmax(self.confidences(lookahead, said))) if len(said) > 1 else 0
        before, self.anchor = self.tokens, self.branches[best]
        self.anchor.confidence = 1.0
        self.forwards["denoise"] += 1
        rows_n = self.rows_read(self.anchor, rule)
        choice_n, is_final = self._decide(method, rows_n, said[best], seed, verified)
        is_other = self.tokens != before
        self.decided_at[is_other] = self.forwards["denoise"]
        self.is_edited |= is_other & (before != self.mask_token_id)
        is_masked = self.is_masked(self.anchor)
        block = slice(self.first, self.anchor.stop)
        changed = BlockChanged(
            self.number,
            self.first,
            self.tokens[block].copy(),
            is_masked[block],
            all(each.is_done for each in self.anchor.blocks),
        )
        kept = self.first
        for each, is_read_final in zip(self.anchor.blocks, is_final, strict=True):
            if not is_read_final or len(of_branches) > 1:  # whose keys lie beside
                break
            kept = each.stop
        self.lookahead = []
        if lookahead.branches:
            is_left_n = is_masked[rows_n]
            self.lookahead = lookahead.spawned(
                self.anchor, rows_n[is_left_n], choice_n[is_left_n], lookahead.sureness(said[best])[is_left_n]
            )
        return changed, kept

    def said(self, method: Method, outputs: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """What the head said of the rows of each branch, as fields of `Seen`."""
        figures = method.lookahead.figures(method.rule.figures)
        return [figures_of(figures, output, self.mask_token_id) for output in outputs]

    def confidences(self, lookahead: Lookahead, said: list[dict[str, np.ndarray]]) -> list[float]:
        """Of each branch, under a rule that reads masks alone."""
        return [
            lookahead.confidence(lookahead.sureness(of_branch), branch.confidence)
            for of_branch, branch in zip(said, self.branches, strict=True)
        ]

    def _verified(self, rule: Rule, outputs: list[np.ndarray]) -> np.ndarray:
        """`Seen.verified_m` of the whole sequence, float64 [T]."""
        verified = np.ones(len(self.tokens))
        for (_, rows), output in zip(self.shadows(rule), outputs, strict=True):
            verified[rows] = label_probability(rule.figures, output, self.tokens[rows])
        return verified

    def _decide(
        self,
        method: Method,
        rows_n: np.ndarray,
        said: dict[str, np.ndarray],
        seed: int,
        verified: np.ndarray | None,
    ) -> tuple[np.ndarray, list[bool]]:
        """Step each active block of the anchor; verified: float64 [T] for a rule that verifies.

        Returns the proposed tokens, int64 [n], and of each block whether this forward read its final tokens.
        """
        rule, branch, choice_n = method.rule, self.anchor, said["choice_m"].copy()
        must_fill = method.buffer.must_fill(branch.decided(~self.is_given, self.mask_token_id))
        tokens, is_final = branch.tokens.copy(), []
        for number, block in enumerate(branch.blocks):
            if block.is_done:
                is_final.append(True)
                continue
            here = slice(*np.searchsorted(rows_n, [block.start, block.stop]))
            said_here = {name: each[here] for name, each in said.items()}
            seen = self._seen(block, rows_n[here], said_here, seed, must_fill[number])
            if verified is not None:
                seen = replace(seen, verified_m=verified[block.start : block.stop])
            read, state = rule.read(seen, block.state)
            change = rule.decide(read, state)
            tokens[block.start : block.stop] = change.tokens_m
            choice_n[here] = read.choice_m[rows_n[here] - block.start]
            branch.blocks[number] = replace(
                block, step=block.step + 1, state=change.state, is_done=change.is_done
            )
            weights = self.weights[block.start : block.stop]
            was_whole, is_whole = (weights == 1).all(), change.is_done or change.weight_m is None
            weights[:] = 1 if is_whole else change.weight_m
            is_final.append(bool(change.is_done and was_whole and not change.changes(seen)))
        branch.tokens = tokens
        return choice_n, is_final

    def _seen(
        self, block: Block, rows_n: np.ndarray, said: dict[str, np.ndarray], seed: int, must_fill: bool
    ) -> Seen:
        """A block as its rule sees it, from what was said of `rows_n` of it."""
        figures = {}
        for name, each in said.items():
            figures[name] = np.zeros((block.stop - block.start, *each.shape[1:]), each.dtype)
            figures[name][rows_n - block.start] = each
        here = slice(block.start, block.stop)
        return Seen(
            self.tokens[here].copy(),
            self.is_given[here],
            self.is_masked(self.anchor)[here],
            **figures,
            step=block.step,
            first=block.start,
            mask_token_id=self.mask_token_id,
            draws=Draws(seed, self.number),
            must_fill=must_fill,
        )

    def advance(self, buffer: Buffer) -> None:
        """Leave the blocks in front that are done.

        Where none is left the next that has holes becomes active, else one more in each branch that wants
        it, but not behind an end of the text.
        """
        stop = self.anchor.stop
        for branch in self.branches:
            while branch.blocks and branch.blocks[0].is_done:
                del branch.blocks[0]
        if not self.anchor.blocks:
            return self._activate(stop)
        for branch in self.branches:
            generated = branch.tokens[max(self.given, branch.first) : branch.stop]
            if not np.isin(generated, list(self.limits.end_tokens)).any():
                branch.widen(buffer, self.block_size, ~self.is_given, self.mask_token_id)
        return None

    def _activate(self, at: int) -> None:
        holes = np.flatnonzero(~self.is_given[at:])
        if len(holes):
            start = (at + int(holes[0])) // self.block_size * self.block_size
            self.anchor.blocks = [Block(start, min(start + self.block_size, len(self.tokens)))]

    def ended(self, changed: BlockChanged, rule: Rule, text: Text | None) -> Result | None:
        """The result, if this change of the active blocks ends the sequence."""
        undecided = np.append(np.flatnonzero(changed.is_masked), len(changed.tokens))
        decided = final = changed.first + int(undecided[0])
        if rule.edits:  # what stands in front of the first mask may change until its block is done
            unfinished = [block.start for block in self.anchor.blocks if not block.is_done]
            final = min([*unfinished, self.anchor.stop])
        if final > self._looked_at:
            behind, ahead = max(self.given, changed.first), min(final, self.wanted)
            ends = np.isin(self.tokens[behind:ahead], list(self.limits.end_tokens))
            if ends.any():
                return self._result(behind + int(ends.argmax()) + 1, Stop.end, text)
            if found := self._stop_string(ahead, text):
                return self._result(*found)
            self._looked_at = final
        if self.is_given[final : self.wanted].all():
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
