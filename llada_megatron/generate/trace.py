"""The order in which a decoder decided tokens, and which it decided again: for people who look at a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from llada_megatron.generate.prompt import BlockChanged

BROKEN = "\ufffd"
"""What a part of a character decodes to."""
Decision = tuple[int | None, bool]
"""The forward that decided a token, from 1 for each prompt (None: it was given), and whether it replaced
another."""
Piece = tuple[str, int | None, bool]
"""Text of tokens that were decided alike."""
GIVEN: Decision = (None, False)


@dataclass
class Trace:
    """Decisions by prompt and position, told by the events of `Decoder.run`, of this rank's replica."""

    decisions: dict[int, dict[int, Decision]] = field(default_factory=dict)
    """Of the active blocks' positions, those that were given among them."""
    _forwards: Counter[int] = field(default_factory=Counter)
    _tokens: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, change: BlockChanged) -> None:
        """What a forward made of a block. A token that was hidden for a while was not replaced by itself."""
        self._forwards[change.prompt] += 1
        decided = self.decisions.setdefault(change.prompt, {})
        block = zip(change.tokens.tolist(), change.is_masked.tolist(), strict=True)
        for at, (token, is_masked) in enumerate(block, start=change.first):
            before = self._tokens.get((change.prompt, at))
            if is_masked or before == token:
                continue
            self._tokens[change.prompt, at] = token
            decided[at] = self._forwards[change.prompt], before is not None


def pieces_of(
    tokens: Sequence[int], decisions: Sequence[Decision], text: Callable[[list[int]], str]
) -> list[Piece]:
    """A text in pieces of tokens that were decided alike; together they are the text of all tokens.

    A character of several tokens belongs to the last of them.
    """
    pieces: list[Piece] = []
    shown = ""
    for decision, places in groupby(range(len(tokens)), lambda at: decisions[at]):
        *_, last = places
        so_far = text(list(tokens[: last + 1]))
        if last + 1 < len(tokens):
            so_far = so_far.rstrip(BROKEN)
        pieces.append((so_far[len(shown) :], *decision))
        shown = so_far
    return [piece for piece in pieces if piece[0]]
