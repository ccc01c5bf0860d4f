"""Wrong tokens that a model learns to put right: objectives `editing` and `oput` (docs/editing.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llada_megatron.config.choices import WrongWords
from llada_megatron.config.ranges import Amount, Count, Range, Share


@dataclass
class EditingConfig:
    """Objective `editing`: masked tokens, and visible ones that are wrong (LLaDA2.1, arXiv 2602.08676).

    Its shares and weights are not published: these are ours.
    """

    replaced: Share = 0.1
    """Of the tokens that are not masked and may be, so many are replaced by wrong ones."""
    words: WrongWords = WrongWords.text
    vocabulary: Count = 0
    """Of `words=vocabulary`: ids below it are drawn; the number of the tokenizer's tokens."""
    weight: Amount = 1.0
    """Of a replaced token's cross entropy, where a masked one's has w(t)."""
    kept_weight: Amount = 1.0
    """Of a token that stands there right; without it a model learns that whatever stands is wrong."""


@dataclass
class OputConfig:
    """Objective `oput`: the model's own drafts, and all tokens as targets (DMax, arXiv 2604.08302)."""

    turns: Annotated[int, Range(at_least=1, at_most=16)] = 1
    """Forward passes that draft: the first fills the masks, each later one reads the draft before it."""
    drafted: Share = 1.0
    """Of the samples, so many read drafts; the others masks."""
