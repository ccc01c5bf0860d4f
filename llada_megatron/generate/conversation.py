"""A conversation with a model: rank 0 owns it and says what is decoded, the other ranks follow.

The whole conversation is rendered anew for each answer, as a template may have it; the keys of what it begins
with are in the decoder's pages from the turns before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from llada_megatron.config.errors import BadInput
from llada_megatron.data.chat import ChatEncoder
from llada_megatron.data.chat_template import ASSISTANT, Message
from llada_megatron.generate.decoder import Decoder
from llada_megatron.generate.prompt import BlockChanged, Event, Limits, Prompt, PromptRead, Result
from llada_megatron.parallel import ranks
from llada_megatron.runtime import device

STOPPED = "stopped"
"""Why an answer ends that somebody stopped, beside the reasons of `Stop`."""


@dataclass(frozen=True)
class Draft:
    """An answer while it is decoded."""

    done: list[int]
    """Tokens of finished blocks."""
    block: list[int | None]
    """The active block, up to an end token; None where no token stands yet."""
    is_edited: list[bool]
    """Where another token of the block stood before."""
    forwards: int
    """That changed blocks of this answer."""

    @property
    def tokens(self) -> list[int]:
        """What stands before the first masked position."""
        decided = self.block.index(None) if None in self.block else len(self.block)
        return self.done + [token for token in self.block[:decided] if token is not None]


@dataclass(frozen=True)
class Answer:
    """What became of a turn."""

    text: str
    tokens: int
    stop: str
    """A `Stop`, or STOPPED."""
    denoised: int
    """Forwards that changed blocks."""
    forwards: int
    """All of them."""
    shared: int
    """Tokens of the prompt whose keys were there already."""
    seconds: float

    @property
    def tokens_per_forward(self) -> float:
        """Generated tokens per forward that was no prefill."""
        return self.tokens / max(1, self.denoised)

    @property
    def tokens_per_sec(self) -> float:
        """Of the whole turn, the reading of its prompt included."""
        return self.tokens / max(self.seconds, 1e-9)


class Conversation:
    """Turns on rank 0; `follow` is what the other ranks do meanwhile."""

    def __init__(self, decoder: Decoder, encoder: ChatEncoder, limits: Limits, system: str = "") -> None:
        self.decoder, self.encoder, self.limits = decoder, encoder, limits
        self.turns = 0
        self.begin(system)

    def begin(self, system: str) -> None:
        """Begin anew, with a system message unless it is empty."""
        self.system = system
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def say(self, text: str, is_stopped: Callable[[], bool]) -> Iterator[PromptRead | Draft | Answer]:
        """The answer to a message of the user: what is read and drafts, forward by forward, the answer at
        last.

        It joins the conversation if there is any text in it, stopped or not; else the message leaves too.
        Raises BadInput, and leaves the conversation as it was, for a message that cannot be answered.
        """
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        tokens = self.encoder.prompt(asked)
        context = self.decoder.longest
        if len(tokens) >= context:
            raise BadInput(
                f"The conversation has {len(tokens)} tokens with this message, and the model's context of"
                f" {context} has no room for an answer: /reset begins anew."
            )
        prompt = Prompt(tokens, number=self.turns)
        self.decoder.check(0, prompt, self.limits)
        self.turns += 1
        for said in self._decoded(prompt, is_stopped):
            if isinstance(said, Answer) and said.text.strip():
                self.messages = [*asked, {"role": ASSISTANT, "content": said.text}]
            yield said

    def end(self) -> None:
        """Let the other ranks go."""
        _from_first_rank(None)

    def _decoded(
        self, prompt: Prompt, is_stopped: Callable[[], bool]
    ) -> Iterator[PromptRead | Draft | Answer]:
        counts, began = self.decoder.counts, device.seconds()
        before, shared = counts.forwards, counts.shared_tokens
        drafts = _Drafts(len(prompt.tokens), self.limits)
        result = None
        _from_first_rank(prompt)
        for event in events(self.decoder, prompt, self.limits, is_stopped):
            if isinstance(event, Result):
                result = event
            else:
                yield drafts.changed(event) if isinstance(event, BlockChanged) else event
        tokens = drafts.draft.tokens if result is None else result.tokens.tolist()
        assert self.decoder.text is not None
        yield Answer(
            self.decoder.text(tokens) if result is None or result.text is None else result.text,
            len(tokens),
            STOPPED if result is None else result.stop.value,
            drafts.draft.forwards,
            counts.forwards - before,
            counts.shared_tokens - shared,
            device.seconds() - began,
        )


class _Drafts:
    """The draft of an answer, forward by forward."""

    def __init__(self, given: int, limits: Limits) -> None:
        self.given, self.limits = given, limits
        self.draft = Draft([], [], [], 0)
        self._first = -1

    def changed(self, event: BlockChanged) -> Draft:
        """With what a forward made of the active blocks."""
        draft, behind = self.draft, max(self.given - event.first, 0)
        left = max(event.first - max(self.given, self._first), 0)  # tokens whose blocks are done meanwhile
        done = draft.done + [token for token in draft.block[:left] if token is not None]
        room = self.limits.new_tokens - len(done)
        block = [
            None if is_masked else int(token)
            for token, is_masked in zip(event.tokens[behind:], event.is_masked[behind:], strict=True)
        ][:room]
        ends = [place for place, token in enumerate(block) if token in self.limits.end_tokens]
        block = block[: ends[0] + 1] if ends else block
        before = [*draft.block[left:], *[None] * len(block)][: len(block)]
        edited = [*draft.is_edited[left:], *[False] * len(block)]
        is_edited = [
            was_edited or (old is not None and old != new)
            for was_edited, old, new in zip(edited, before, block, strict=False)
        ]
        self._first = event.first
        self.draft = Draft(done, block, is_edited, draft.forwards + 1)
        return self.draft


def events(
    decoder: Decoder, prompt: Prompt, limits: Limits, is_stopped: Callable[[], bool]
) -> Iterator[Event]:
    """What the decoder says of a prompt, on every rank, until it is done or rank 0 wants it stopped."""
    for event in decoder.run([prompt], limits):  # whose pages are given back when it is left
        yield event
        if _first_rank_wants(is_stopped):
            return


def follow(decoder: Decoder, limits: Limits) -> None:
    """Decode what rank 0 says, until its conversation ends."""
    while (prompt := _from_first_rank(None)) is not None:
        for _ in events(decoder, prompt, limits, lambda: False):
            pass


def _from_first_rank(prompt: Prompt | None) -> Prompt | None:
    return ranks.from_first_rank(lambda: prompt)


def _first_rank_wants(is_stopped: Callable[[], bool]) -> bool:
    if ranks.ranks() == 1:
        return is_stopped()
    wanted = torch.tensor(int(is_stopped()), device=device.device())
    dist.broadcast(wanted, 0)
    return bool(wanted)
