"""Decoding for models that predict next tokens: autoregressive ones, and the family `dlcm`.

A sequence grows by one token a forward, which the row of the token before says: a block of one position whose
figures are those of the row in front of it. So limits, ends and draws are those of any decoding, and what a
row left behind is final at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from llada_megatron.attention.keys import PooledKeys, PoolPart
from llada_megatron.config.errors import BadInput
from llada_megatron.generate.branches import Block
from llada_megatron.generate.buffer import ONE_BLOCK
from llada_megatron.generate.decoder import Decoder, numbered
from llada_megatron.generate.feed import Part
from llada_megatron.generate.prompt import BlockChanged, Ids, Limits, Prompt, PromptRead, Result
from llada_megatron.generate.reserved import Reserved
from llada_megatron.generate.running import Running
from llada_megatron.model.concept_cache import CachedConcepts, ConceptCache
from llada_megatron.model.dlcm import DynamicConcepts
from llada_megatron.runtime import device


class Growing(Running):
    """A sequence whose blocks are single tokens; one page has room for all of it."""

    def __init__(self, *about: Any, block_size: int, **settings: Any) -> None:
        super().__init__(*about, block_size=1, **settings)
        self.block_size = block_size  # of pages

    def _activate(self, at: int) -> None:
        if at < len(self.tokens):
            at = max(at, self.given)
            self.anchor.blocks = [Block(at, at + 1)]


@dataclass
class Feed:
    """What of a sequence the next forward reads: tokens behind those that are kept, up to `stop`."""

    running: Growing
    stop: int
    rows: list[np.ndarray]
    """The position whose next token is wanted, of the only branch; none where the prompt goes on."""

    def parts(self) -> Iterator[Part]:
        """Of the sequence."""
        kept, tokens = self.running.kept, self.running.tokens
        here, chosen = slice(kept, self.stop), np.concatenate([*self.rows, np.zeros(0, np.int64)])
        keys = PoolPart(kept, self.running.places(self.stop))
        yield Part(keys, tokens[here], self.running.weights[here], chosen - kept, tokens[chosen])


@dataclass
class NextTokenDecoder(Decoder):
    """A `Decoder` for models that predict next tokens.

    Its own `block_size` is the page that a sequence has for all its tokens from its first forward to its last
    one, so prompts that begin alike share nothing. Every rule that fills masks alone fills the only one;
    `ar` says what happens. Raises BadInput for what a block needs more tokens for.
    """

    def __post_init__(self) -> None:
        if self.buffer != ONE_BLOCK or self.lookahead.branches or self.rule.edits or self.cuda_graphs:
            raise BadInput(
                "A model that predicts next tokens has no blocks: leave buffers, branches (--buffer,"
                " --branches), --cuda-graphs and rules that change tokens out."
            )
        self.block_size = self.context
        if 0 < self.max_cached_tokens < self.context:
            raise BadInput(
                f"max_cached_tokens is {self.max_cached_tokens}, and a sequence takes room for the context of"
                f" {self.context}: raise it, or lower data.sequence_length."
            )
        super().__post_init__()
        self.concepts: ConceptCache | None = None
        """Of the family dlcm."""
        if isinstance(unwrap_model(self.model), DynamicConcepts):
            self.concepts = ConceptCache(self.pages.count, self.context)
            self._even = False  # tokens meet no experts
            self._check_experts()

    def _check_experts(self) -> None:
        ranks = parallel_state.get_expert_model_parallel_world_size()
        ranks *= parallel_state.get_expert_tensor_parallel_world_size()
        if ranks > self._tp:
            raise BadInput(
                f"Experts of concepts lie on {ranks} ranks, more than the layout.tp={self._tp} of a replica,"
                " and replicas finish concepts at different times: set layout.ep and layout.etp so that their"
                " product is at most layout.tp."
            )

    @property
    def seen_block(self) -> int:
        """A row sees its own token and those before it."""
        return 1

    @property
    def cache_bytes(self) -> int:
        """What is kept takes on this rank, once there was a forward."""
        return self._pool.bytes if self.concepts is None else self.concepts.bytes

    def check(self, number: int, prompt: Prompt | Ids, limits: Limits) -> Growing:
        """The prompt, ready to be decoded; BadInput, naming it by its number, where it cannot be."""
        number, prompt = numbered(number, prompt)
        if not len(prompt.tokens) or prompt.has_holes:
            raise BadInput(
                f"Prompt {number} {'has holes' if prompt.has_holes else 'is empty'}, and the model predicts"
                " the token behind others: give it tokens to go on from."
            )
        return self.begun(Growing, number, prompt, limits)

    def take_room(self, running: Growing) -> bool:
        """Give a sequence the places of its keys; False where there are none as long as others run."""
        page = self.pages.take()
        running.pages = [] if page is None else [page]
        return page is not None

    def _batch(self, prompts: Iterator[tuple[int, Prompt]], limits: Limits) -> Any:
        return _Batch(self, prompts, limits)

    def _keys_of(self, parts: list[PoolPart]) -> tuple[PooledKeys, torch.Tensor]:
        if self.concepts is None:
            return super()._keys_of(parts)
        keys = CachedConcepts(self.concepts, parts).to(device.device())
        return keys, torch.from_numpy(keys.positions)[None].to(device.device())


class _Batch(Reserved[Growing]):
    """The sequences at hand, oldest first, and the one that waits for room."""

    def __init__(
        self, decoder: NextTokenDecoder, prompts: Iterator[tuple[int, Prompt]], limits: Limits
    ) -> None:
        super().__init__(decoder, prompts, limits)
        self.decoder = decoder

    def feeds(self) -> list[Feed]:
        """What the next forward reads: at most `prefill_tokens` beside the last token of each sequence."""
        budget, feeds = max(self.decoder.prefill_tokens, 1), []
        for running in self.running:
            before = running.first - running.kept - 1  # the row that says the next token
            ahead = min(before, budget)
            budget -= ahead
            if ahead == before:
                feeds.append(Feed(running, running.first, [np.array([running.first - 1])]))
            elif ahead:
                feeds.append(Feed(running, running.kept + ahead, []))
        return feeds

    def read(self, feed: Feed, outputs: list[np.ndarray]) -> tuple[PromptRead | BlockChanged, Result | None]:
        """Take in what a forward said of a sequence's next token, [1, C], and kept of those before it."""
        running, decoder = feed.running, self.decoder
        running.kept = feed.stop
        if not feed.rows:
            running.forwards["prefill"] += 1
            return PromptRead(running.number, feed.stop, running.first), None
        changed, _ = running.step(decoder.method, outputs, decoder.seed)
        result = running.ended(changed, decoder.rule, decoder.text)
        running.advance(decoder.buffer)
        if result is not None:
            self.leave(running)
        return changed, result
