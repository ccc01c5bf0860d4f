"""Versions of a sequence that are looked at beside it: LoPA's lookahead branches (arXiv 2512.16229).

After a forward the rule fills what it fills: that is the anchor. Each lookahead branch is the anchor with one
token more, at one of the masks that the model is surest of. The next forward reads all of them, isolated from
each other, and the branch whose remaining masks the model is surest of goes on: what that forward said of it
is what the rule decides by. Without lookahead branches it is plain decoding.

Legend: T tokens of a sequence, m positions of a block, n masks of a branch, C figures per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from llada_megatron.config.ranges import Count, Range, Share
from llada_megatron.generate.buffer import Buffer
from llada_megatron.generate.rules.seen import Figures, entropy, log_probability


@dataclass(frozen=True)
class Block:
    """An active block, and what its rule keeps of it."""

    start: int
    stop: int
    step: int = 0
    """Forwards that it has had."""
    state: Any = None
    is_done: bool = False


@dataclass
class Branch:
    """One version of a sequence: its tokens and its active blocks, which follow each other."""

    tokens: np.ndarray
    """int64 [T]"""
    blocks: list[Block]
    confidence: float = 1.0
    """Of its token more, where it was made with one."""

    @property
    def first(self) -> int:
        """Where its active blocks begin; T without any."""
        return self.blocks[0].start if self.blocks else len(self.tokens)

    @property
    def stop(self) -> int:
        """Where they end."""
        return self.blocks[-1].stop if self.blocks else len(self.tokens)

    def with_token(self, position: int, token: int, confidence: float) -> Branch:
        """This one with one token more."""
        tokens = self.tokens.copy()
        tokens[position] = token
        return Branch(tokens, list(self.blocks), confidence)

    def decided(self, is_open: np.ndarray, mask_token_id: int) -> list[float]:
        """Of each active block the share of its positions that are decided, of those that are not given.

        is_open: bool [T], what is not given.
        """
        shares = []
        for block in self.blocks:
            of_block = self.tokens[block.start : block.stop][is_open[block.start : block.stop]]
            shares.append(float(np.mean(of_block != mask_token_id)) if len(of_block) else 1.0)
        return shares

    def widen(self, buffer: Buffer, block_size: int, is_open: np.ndarray, mask_token_id: int) -> None:
        """One active block more, where the buffer has room for it and the last one is decided far enough."""
        if self.stop == len(self.tokens) or not buffer.wants_more(self.decided(is_open, mask_token_id)):
            return
        stop = min(self.stop + block_size, len(self.tokens))
        self.blocks.append(Block(self.stop, stop, is_done=not is_open[self.stop : stop].any()))


@dataclass(frozen=True)
class Lookahead:
    """How many branches there are, and by what one of them wins: the highest confidence, the first of equals.

    The anchor counts as the last. A branch without masks has confidence 1.
    """

    branches: Count = 0
    """Beside the anchor (the paper's k)."""
    by_entropy: bool = False
    """Confidence at a mask is minus the entropy of its distribution in nats, else the highest probability."""
    lowest: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Confidence of a branch is the mean over this share of its masks, those of the least."""
    memory: Share = 0.0
    """Weight that the confidence of a branch's own token has in it, as it was when the token was chosen."""

    def figures(self, of_rule: Figures) -> Figures:
        """What is needed of the head beside what the rule needs."""
        wants_entropy = self.branches and self.by_entropy and of_rule is Figures.top_one
        return Figures.entropy if wants_entropy else of_rule

    def sureness(self, figures: dict[str, np.ndarray]) -> np.ndarray:
        """Confidence at each row of `figures_of`, float64 [n]."""
        if not self.by_entropy:
            return figures["probability_m"]
        if "entropy_m" in figures:
            return -figures["entropy_m"]
        return -entropy(log_probability(figures["logits_mV"]))

    def confidence(self, sureness_n: np.ndarray, of_its_token: float) -> float:
        """Of a branch, from that at each of its masks."""
        rest = 1.0
        if n := len(sureness_n):
            rest = float(np.sort(sureness_n)[: max(1, int(n * self.lowest))].mean())
        return self.memory * of_its_token + (1 - self.memory) * rest

    def spawned(
        self, anchor: Branch, masked_n: np.ndarray, choice_n: np.ndarray, sureness_n: np.ndarray
    ) -> list[Branch]:
        """The lookahead branches, the surest first; of the anchor's masks, positions int64 [n]."""
        best_k = np.argsort(-sureness_n, kind="stable")[: self.branches].tolist()
        return [anchor.with_token(int(masked_n[k]), int(choice_n[k]), float(sureness_n[k])) for k in best_k]


ANCHOR_ALONE = Lookahead()
