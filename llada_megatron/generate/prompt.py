"""What a decoder is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

Ids = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prompt:
    """Token ids to go on from."""

    tokens: Ids
    has_holes: bool = False
    """Mask tokens among them are filled; else they are refused."""
    number: int | None = None
    """Names it in results and decides its draws; None: its place among the prompts, from 0."""
    draft: Ids = ()
    """Stands behind the prompt at first, where masks would, for a rule that edits to mend."""


@dataclass(frozen=True)
class Limits:
    """Where decoding ends, whatever comes first."""

    new_tokens: int = 512
    """At most so many behind the prompt; 0: only its holes are filled."""
    end_tokens: Collection[int] = ()
    """Ids of which the first one that is generated is the last token of the text."""
    strings: Sequence[str] = ()
    """The text ends before the first of them that is whole: looked for in front of the first mask, under a
    rule that edits when a block is done."""
    forwards: int = 0
    """That a prompt takes part in; 0: as many as it takes."""


class Stop(StrEnum):
    """Why decoding ended."""

    end = "end"
    """An end token."""
    string = "string"
    length = "length"
    """Limits.new_tokens, or every hole is filled."""
    context = "context"
    """No position is left that the model was trained for."""
    forwards = "forwards"


@dataclass(frozen=True)
class PromptRead:
    """A forward read some of a long prompt, and nothing else of its sequence."""

    prompt: int
    """The prompt's number, from 0."""
    tokens: int
    """Whose keys are kept now."""
    of: int
    """Tokens before the first block that is decoded."""


@dataclass(frozen=True)
class BlockChanged:
    """What one forward made of a prompt's active block."""

    prompt: int
    """The prompt's number, from 0."""
    first: int
    """Position of the block's first token in its sequence."""
    tokens: npt.NDArray[np.int64]
    is_masked: npt.NDArray[np.bool_]
    """Where no token has been decided yet."""
    is_done: bool


@dataclass(frozen=True)
class Result:
    """A prompt that is done."""

    prompt: int
    """The prompt's number, from 0."""
    tokens: npt.NDArray[np.int64]
    """What was generated, up to the end token and with it; of a prompt with holes the whole sequence."""
    text: str | None
    """Of the tokens, where the decoder was given a `text`; cut before a stop string."""
    stop: Stop
    decided_at: npt.NDArray[np.int64]
    """The denoising forward, from 1, that each token had its last change in; 0: it was given."""
    is_edited: npt.NDArray[np.bool_]
    """Where a token stood before that another one replaced."""
    forwards: dict[str, int]
    """`prefill`: read the prompt alone. `denoise`: changed a block, and read what was not kept before it.
    `store`: only kept a finished block, which none does: the next block's first forward does it as well."""
    generated: int
    """How many of the tokens were: all of them, or the holes."""
    seconds: float
    """From the first forward's preparation to the last token; other prompts of the batch share them."""

    @property
    def tokens_per_forward(self) -> float:
        """Generated tokens per forward that was no prefill."""
        return self.generated / max(1, self.forwards["denoise"] + self.forwards["store"])


Event = PromptRead | BlockChanged | Result
