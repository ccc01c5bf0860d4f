"""Decoding for models that predict next tokens: autoregressive ones, and the family `dlcm`.

A sequence grows by one token a forward, which the row of the token before says: a block of one position whose
figures are those of the row in front of it. So limits, ends and draws are those of any decoding, and what a
row left behind is final at once: sequences that begin alike share their pages.
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
from llada_megatron.generate.decoder import Batch, Decoder, numbered
from llada_megatron.generate.feed import Feed, Part
from llada_megatron.generate.prompt import Ids, Limits, Prompt
from llada_megatron.generate.running import Running
from llada_megatron.model.concept_cache import CachedConcepts, ConceptCache
from llada_megatron.model.dlcm import DynamicConcepts
from llada_megatron.runtime import device

PAGE_TOKENS = 32
"""Of a page: sequences share whole ones, and the last page of each is half empty on average."""


class Growing(Running):
    """A sequence whose blocks are single tokens, in pages of several."""

    def __init__(self, *about: Any, block_size: int, **settings: Any) -> None:
        super().__init__(*about, block_size=1, **settings)
        self.block_size = block_size  # of pages

    @property
    def before(self) -> int:
        """The tokens in front of the one whose row says the next."""
        return self.first - 1

    def _activate(self, at: int) -> None:
        if at < len(self.tokens):
            at = max(at, self.given)
            self.anchor.blocks = [Block(at, at + 1)]


class OneToken(Feed):
    """The tokens behind those that are kept, up to `stop`: the last one is the row that says the next token,
    if there is any."""

    def parts(self) -> Iterator[Part]:
        """Of the only branch."""
        running = self.running
        rows = np.concatenate([*self.rows, np.zeros(0, np.int64)])
        yield self._part(running.anchor, running.kept, self.stop, running.places(self.stop), rows)


@dataclass
class NextTokenDecoder(Decoder):
    """A `Decoder` for models that predict next tokens.

    Its own `block_size` is that of pages. Every rule that fills masks alone fills the only one; `ar` says
    what happens. Raises BadInput for what a block needs more tokens for.
    """

    def __post_init__(self) -> None:
        if self.buffer != ONE_BLOCK or self.lookahead.branches or self.rule.edits or self.cuda_graphs:
            raise BadInput(
                "A model that predicts next tokens has no blocks: leave buffers, branches (--buffer,"
                " --branches), --cuda-graphs and rules that change tokens out."
            )
        self.block_size = min(PAGE_TOKENS, self.context)
        whole = -(-self.context // self.block_size) * self.block_size
        self.max_cached_tokens = self.max_cached_tokens or self.batch * whole
        super().__post_init__()
        self.concepts: ConceptCache | None = None
        """Of the family dlcm."""
        if isinstance(unwrap_model(self.model), DynamicConcepts):
            self.concepts = ConceptCache(self.pages.count, self.block_size)
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
    def longest(self) -> int:
        """Positions of the longest sequence, whose last page may be short."""
        return self.context

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
        return self.fitting(self.begun(Growing, number, prompt, limits))

    def _batch(self, prompts: Iterator[tuple[int, Prompt]], limits: Limits) -> Batch:
        return _Batch(self, prompts, limits)

    def _keys_of(self, parts: list[PoolPart]) -> tuple[PooledKeys, torch.Tensor]:
        if self.concepts is None:
            return super()._keys_of(parts)
        keys = CachedConcepts(self.concepts, parts).to(device.device())
        return keys, torch.from_numpy(keys.positions)[None].to(device.device())


class _Batch(Batch):
    """The sequences at hand, oldest first, and those that wait."""

    def feeds(self) -> list[Feed]:
        """What the next forward reads: at most `prefill_tokens` beside the last token of each sequence."""
        budget = max(self.decoder.prefill_tokens, 1)
        feeds: list[Feed] = []
        for running in list(self.running):
            ahead = min(running.before - running.kept, budget)
            budget -= ahead
            stop = running.kept + ahead
            rows = [np.array([stop])] if stop == running.before else []
            stop += len(rows)
            if stop > running.kept and running in self.running and self._make_room(running, stop):
                feeds.append(OneToken(running, stop, rows, here=[], shadows=[]))
        return feeds
