"""Decoding for models in which every position sees every other: LLaDA's (arXiv 2502.09992), objective MDLM.

A sequence is the prompt and as many masks as there shall be new tokens. Blocks count from the prompt's end,
and the rule decides on the active one alone, but each forward sees the whole sequence, the masks behind the
block among it. So no key is ever final before the sequence is, and what is kept is an approximation: a cache
says which rows a forward reads anew, and of the others finds the keys that the last one which read them left.

Legend: T tokens of a sequence, S rows of a forward, N of them read by a rule, C figures per row,
V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from llada_megatron.attention.keys import PoolPart
from llada_megatron.config.errors import BadInput
from llada_megatron.config.ranges import Amount, Count, check_values
from llada_megatron.generate.branches import Block
from llada_megatron.generate.buffer import ONE_BLOCK
from llada_megatron.generate.decoder import Decoder
from llada_megatron.generate.feed import Part, shadow_of
from llada_megatron.generate.next_tokens import NextTokenDecoder
from llada_megatron.generate.prompt import BlockChanged, Ids, Limits, Prompt, Result
from llada_megatron.generate.rules import Figures, label_probability
from llada_megatron.generate.rules.registry import converted, settings_in
from llada_megatron.generate.rules.seen import entropy, log_probability, proposed
from llada_megatron.generate.running import Running
from llada_megatron.model.readout import LOGITS

ALL = 2**62
"""More positions than any sequence has."""


@dataclass(frozen=True)
class FullAttention:
    """Which rows a forward reads, and how far it follows the prompt.

    All of a block's first forwards, at least the first one, read every row; later ones those from `before`
    positions in front of the block to `after` positions behind it.
    """

    before: Count = ALL
    after: Count = ALL
    warmup: Count = 1
    """Forwards of a block that read every row."""
    cfg_scale: Amount = 0.0
    """w of classifier-free guidance: without + (w + 1) (with - without), in logits; `without` is the forward
    whose prompt is masked. 0: one forward alone."""

    @property
    def is_exact(self) -> bool:
        """Nothing is kept from one forward to the next."""
        return self.before >= ALL and self.after >= ALL

    @property
    def copies(self) -> int:
        """Sequences of a forward for each that is decoded."""
        return 2 if self.cfg_scale else 1

    def read(self, step: int, start: int, stop: int, length: int) -> slice:
        """Rows of a sequence of `length` that forward `step` of the block [start, stop) reads."""
        if step < max(self.warmup, 1):
            return slice(0, length)
        return slice(max(start - self.before, 0), min(stop + self.after, length))


CACHES: dict[str, FullAttention] = {
    "none": FullAttention(),
    "prefix": FullAttention(before=0),
    "dual": FullAttention(before=0, after=0),
    "vicinity": FullAttention(before=16, after=16, warmup=4),
}
"""By name. `prefix` and `dual` are Fast-dLLM's (arXiv 2505.22618), `vicinity` dInfer's (arXiv 2510.08666)."""


def full_attention_of(settings: Mapping[str, Any]) -> FullAttention:
    """From `cache`, a name of CACHES, and settings that replace its own; values may be text.

    Raises BadInput for a name or a setting that is none, a value out of its range, and numbers of rows
    without a cache.
    """
    name = str(settings.get("cache", "none"))
    if name not in CACHES:
        raise BadInput(f"There is no cache {name!r}: give {', '.join(CACHES)}.")
    known, values = settings_in(FullAttention), {}
    for key, value in settings.items():
        if key == "cache":
            continue
        if key not in known:
            raise BadInput(f"Full attention has no setting {key}: give cache, {', '.join(known)}.")
        if name == "none" and key != "cfg_scale":
            raise BadInput(
                f"Without a cache every row is read: leave --cache-{key} out, or give --cache prefix, dual or"
                " vicinity."
            )
        values[key] = converted(key, value, known[key].kind)
    full = replace(CACHES[name], **values)
    check_values(full)
    return full


def kind_of(full: FullAttention | None, *, next_tokens: bool = False) -> Callable[..., Decoder]:
    """What makes the decoder: `Decoder` for a block-diffusion model, whose rows see no later block."""
    if next_tokens:
        return NextTokenDecoder
    return Decoder if full is None else partial(FullDecoder, full=full)


class Filling(Running):
    """A sequence that is as long as what is wanted of it; its blocks count from the prompt's end."""

    def __init__(self, *about: Any, block_size: int, **settings: Any) -> None:
        self._block = block_size
        super().__init__(*about, block_size=1, **settings)  # so that no length is rounded to whole blocks
        self.block_size = block_size  # of pages

    def _activate(self, at: int) -> None:
        holes = np.flatnonzero(~self.is_given[at:])
        if len(holes):
            first = self.given + (at + int(holes[0]) - self.given) // self._block * self._block
            self.anchor.blocks = [Block(max(first, 0), min(first + self._block, len(self.tokens)))]

    def places_of(self, copy: int) -> np.ndarray:
        """int64 [T]: where the keys of a copy of the sequence are kept."""
        pages = np.array(self.pages[copy * self.largest :][: self.largest], np.int64)[:, None]
        return (pages * self.block_size + np.arange(self.block_size)).reshape(-1)[: len(self.tokens)]

    def shadow_places(self, copy: int, copies: int) -> np.ndarray:
        """int64 [block]: where the keys of the shadow of a copy's active block are kept."""
        (block,) = self.anchor.blocks
        page = self.pages[copies * self.largest + copy]
        return page * self.block_size + np.arange(block.stop - block.start)

    def read(self, full: FullAttention) -> slice:
        """Rows that the next forward reads."""
        (block,) = self.anchor.blocks
        return full.read(block.step, block.start, block.stop, len(self.tokens))

    def tokens_of(self, copy: int) -> np.ndarray:
        """int64 [T]: the sequence, or for guidance the one without what was given."""
        return self.tokens if copy == 0 else np.where(self.is_given, self.mask_token_id, self.tokens)


@dataclass
class Feed:
    """What of a sequence the next forward reads."""

    running: Filling
    read: slice
    rows: list[np.ndarray]
    """The positions that the rule reads, of the only branch, and of the shadow of its block if it has one."""

    def parts(self, copy: int, copies: int) -> Iterator[Part]:
        """Of a copy of the sequence."""
        running, read = self.running, self.read
        places, (rows, *shadowed) = running.places_of(copy), self.rows
        yield Part(
            PoolPart(read, places),
            running.tokens_of(copy)[read],
            running.weights[read],
            rows - read.start,
            running.tokens[rows],
        )
        for rows in shadowed:
            (block,) = running.anchor.blocks
            own = slice(block.start, block.stop)
            yield shadow_of(running, own, PoolPart(own, places, running.shadow_places(copy, copies)), rows)


@dataclass
class FullDecoder(Decoder):
    """A `Decoder` for models in which every position sees every other.

    `block_size` is that of the blocks that are filled one after the other; the whole answer can be one.
    A prompt's keys are of no use to another one, so none are shared, and a sequence has its room from its
    first forward to its last one. A forward reads whole prompts, so `prefill_tokens` bounds nothing.
    """

    full: FullAttention = FullAttention()

    def __post_init__(self) -> None:
        if self.buffer != ONE_BLOCK or self.lookahead.branches:
            raise BadInput(
                "A buffer of blocks (--buffer) and lookahead branches (--branches) are for models that were"
                " trained in blocks, and here every position sees every other: leave them out."
            )
        whole = -(-self.context // max(self.block_size, 1)) * self.block_size
        whole += self.block_size * self.rule.verifies
        self.max_cached_tokens = self.max_cached_tokens or self.batch * self.full.copies * whole
        super().__post_init__()

    @property
    def longest(self) -> int:
        """Positions of the longest sequence, whose last block may be short."""
        return self.context

    @property
    def seen_block(self) -> int:
        """No sequence is longer, so a row sees all of its own."""
        return self.context

    def check(self, number: int, prompt: Prompt | Ids, limits: Limits) -> Filling:
        """The prompt, ready to be decoded; BadInput, naming it by its number, where it cannot be."""
        running = self.begun(Filling, number, prompt, limits)
        if (pages := self.pages_of(running)) > self.pages.count:
            raise BadInput(
                f"Prompt {running.number} takes {pages * self.block_size} cached tokens with what is"
                f" generated, and max_cached_tokens is {self.max_cached_tokens}: raise it, or ask for fewer"
                " new tokens."
            )
        return running

    def pages_of(self, running: Filling) -> int:
        """What a sequence takes: each copy, and the shadow of its active block."""
        return self.full.copies * (running.largest + self.rule.verifies)

    def take_room(self, running: Filling) -> bool:
        """Give a sequence the places of its keys; False where there are too few as long as others run."""
        wanted = self.pages_of(running)
        if wanted > self.pages.available:
            return False
        running.pages = [page for _ in range(wanted) if (page := self.pages.take()) is not None]
        return True

    def look(self, running: Filling, read: slice, rows: np.ndarray) -> np.ndarray:
        """One forward of some rows of a sequence that has its room: the figures of `rows`, [N, C]."""
        return self._forward([Feed(running, read, [rows])])

    def _batch(self, prompts: Iterator[tuple[int, Prompt]], limits: Limits) -> Any:
        return _Batch(self, prompts, limits)

    def _forward(self, feeds: list[Any]) -> np.ndarray:
        """The head's figures for the rows that the rule reads, [N, C]; guided ones, where that is wanted."""
        figures = self.rule.figures
        readout = LOGITS if self.full.cfg_scale else figures.readout(self.mask_token_id)
        copies = self.full.copies
        read = [part for copy in range(copies) for feed in feeds for part in feed.parts(copy, copies)]
        output = self._call(read, readout)
        if not self.full.cfg_scale or len(output) < 2:
            return output
        with_NV, without_NV = np.split(output, 2)
        logits_NV = without_NV + (self.full.cfg_scale + 1) * (with_NV - without_NV)
        labels_N = np.concatenate([part.labels for part in read[: len(read) // 2]])
        return figures_from(logits_NV, labels_N, figures, self.mask_token_id)


def figures_from(
    logits_NV: np.ndarray, labels_N: np.ndarray, figures: Figures, mask_token_id: int
) -> np.ndarray:
    """What the head would say with such logits, [N, C]."""
    if figures is Figures.logits:
        return logits_NV
    columns = [*proposed(logits_NV, mask_token_id)]
    if figures is Figures.label:
        columns.append(label_probability(Figures.logits, logits_NV, labels_N))
    if figures is Figures.entropy:
        columns.append(entropy(log_probability(logits_NV)))
    return np.stack(columns, axis=-1).astype(np.float64)


class _Batch:
    """The sequences at hand, each with its room from its first forward to its last one, and the one that
    waits."""

    def __init__(self, decoder: FullDecoder, prompts: Iterator[tuple[int, Prompt]], limits: Limits) -> None:
        self.decoder, self._prompts, self.limits = decoder, prompts, limits
        self.running: list[Filling] = []
        self._waiting: Filling | None = None

    def enter(self) -> list[Result]:
        """Let sequences in as long as there is room; returns what is done without a forward."""
        done, decoder = [], self.decoder
        while len(self.running) < decoder.batch and (running := self._next()) is not None:
            running.began = running.began or time.perf_counter()
            if running.is_filled:
                done.append(running.untouched(decoder.text))
                continue
            if not decoder.take_room(running):
                self._waiting = running
                break
            self.running.append(running)
        return done

    def _next(self) -> Filling | None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            return waiting
        number, prompt = next(self._prompts, (0, None))
        return None if prompt is None else self.decoder.check(number, prompt, self.limits)

    def leave(self, running: Filling) -> None:
        """A sequence is done."""
        for page in running.pages:
            self.decoder.pages.release(page)
        self.running.remove(running)

    def leave_all(self) -> None:
        """Nobody is decoded any more."""
        for running in [*self.running]:
            self.leave(running)

    def feeds(self) -> list[Feed]:
        """What the next forward reads of each sequence."""
        rule, full = self.decoder.rule, self.decoder.full
        return [Feed(each, each.read(full), each.read_rows(rule)) for each in self.running]

    def read(self, feed: Feed, outputs: list[np.ndarray]) -> tuple[BlockChanged, Result | None]:
        """Take in what a forward said of a sequence's active block, and of its shadow, [n, C] each."""
        running, decoder = feed.running, self.decoder
        changed, _ = running.step(decoder.method, outputs, decoder.seed)
        result = running.ended(changed, decoder.rule, decoder.text)
        running.advance(decoder.buffer)
        if result is not None:
            self.leave(running)
        return changed, result
