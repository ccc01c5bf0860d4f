"""What the family `dlcm` keeps of a sequence between forwards, so that each reads new tokens alone.

    encoder, decoder        keys and values of all tokens
    detector                the last token's query, for the next one's boundary
    unfinished concept      the sum of its h and their number, and p of its first token
    backbone                keys and values of concepts
    smoothing               s of the newest concept
    attention to concepts   keys and values of the start vector and of concepts

A concept goes through the backbone once: a mean when the next one opens, a boundary token at once. Rows of
several sequences lie one after the other, in parts; in front of the rows of a part stands what was kept of
its sequence, as one entry more, so that the functions of model/concepts.py serve entries as they do tokens.

Legend: P parts, T rows of all parts, E = P + T entries, M concepts of the entries, F of them that are new to
the backbone, H hidden size of tokens, Hc of concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llada_megatron.attention import BlockDiffusionMask, Rectangle
from llada_megatron.attention.keys import KeyPool, PooledKeys, PoolPart
from llada_megatron.config.schema import BlockGrid
from llada_megatron.model.concepts import Segments
from llada_megatron.model.cross_attention import Sight
from llada_megatron.runtime.device import sent


class ConceptCache:
    """Room for so many sequences of `longest` tokens; sequence s has the places from s * longest on.

    The concepts of a sequence are fewer than its tokens, and have room for as many. Rows that belong to no
    sequence are one behind them, which has a single place and no concepts.
    """

    def __init__(self, sequences: int, longest: int) -> None:
        self.sequences, self.longest = sequences, longest
        self.encoder, self.decoder, self.backbone = (KeyPool(sequences * longest + 1) for _ in range(3))
        self.seen = KeyPool(sequences * (longest + 1) + 1)
        """Of each sequence the start vector, then concepts."""
        self.concepts = np.zeros(sequences + 1, np.int64)
        """Of each sequence those that the backbone has read."""
        self.unfinished = np.zeros(sequences + 1, np.int64)
        """Of each the tokens that its unfinished concept has so far."""
        self.backbone_forwards = self.backbone_rows = 0
        """How often the backbone ran, and the concepts that it read."""
        self._kept: dict[str, Tensor] = {}

    def kept(self, name: str, like: Tensor) -> Tensor:
        """A row for each sequence, [sequences + 1, *] of like [n, *]; zero where nothing was kept yet."""
        if name not in self._kept:
            self._kept[name] = like.new_zeros(len(self.concepts), *like.shape[1:])
        return self._kept[name]

    @property
    def bytes(self) -> int:
        """What all of it takes on this rank."""
        pools = (self.encoder, self.decoder, self.backbone, self.seen)
        return sum(pool.bytes for pool in pools) + sum(each.nbytes for each in self._kept.values())


class Entries:
    """Rows in parts, in front of each part one entry for what was kept.

    Attributes:
        kept: int64 [P], the entries for what was kept.
        rows: int64 [T], the others, in order.
    """

    def __init__(self, counts: np.ndarray) -> None:
        """counts: int64 [P], the rows of each part."""
        P, T = len(counts), int(counts.sum())
        self.kept = np.cumsum(counts + 1) - counts - 1
        self.rows = np.setdiff1d(np.arange(P + T), self.kept)
        self.last = np.cumsum(counts) - 1
        """int64 [P], the last row of each part, among the rows."""
        self._order = np.empty(P + T, np.int64)
        self._order[self.kept], self._order[self.rows] = np.arange(P), P + np.arange(T)

    def of(self, kept: Tensor, rows: Tensor) -> Tensor:
        """[E, *] of what was kept, [P, *], and rows [T, *]."""
        return torch.cat([kept, rows]).index_select(0, at_of(self._order, rows))


class CachedConcepts(PooledKeys):
    """The encoder's keys of the rows at hand, with what is kept of their sequences beside.

    A part whose rows begin with the first token of its sequence takes over nothing of one before.
    """

    def __init__(self, cache: ConceptCache, parts: Sequence[PoolPart]) -> None:
        super().__init__(cache.encoder, parts, block_size=1)
        self.cache = cache
        firsts = np.array([part.rows for part in parts])
        self.sequences = np.array([part.places[0] // cache.longest for part in parts])
        self.begins = firsts == 0
        self.entries = Entries(np.array([len(part.places) for part in parts]) - firsts)
        self.first_entries = np.sort(np.append(self.entries.kept, self.entries.kept[self.begins] + 1))
        """int64: the entries that open a concept whatever the detector says."""

    @property
    def of_decoder(self) -> PooledKeys:
        """The decoder's keys of the same rows."""
        return self.within(self.cache.decoder)

    def kept(self, name: str, like: Tensor, parts: np.ndarray | None = None) -> Tensor:
        """What is kept by that name of the sequence of each part, or of some, [P, *] of like [n, *]."""
        chosen = self.sequences if parts is None else self.sequences[parts]
        return self.cache.kept(name, like).index_select(0, at_of(chosen, like))

    def keep(self, name: str, rows: Tensor, parts: np.ndarray | None = None) -> None:
        """Keep a row [P, *] of the sequence of each part, or of some."""
        chosen = self.sequences if parts is None else self.sequences[parts]
        self.cache.kept(name, rows).index_copy_(0, at_of(chosen, rows), rows)

    def read(self, opened_E: np.ndarray, *, own: bool) -> Reading:
        """What becomes of the concepts, by the entries that open one, bool [E].

        own: a token sees the concept that it is part of. To be called once: what is kept goes on with it.
        """
        segments = Segments(opened_E, self.entries.kept)
        first = segments.document_starts
        last = np.append(first[1:], segments.count) - 1
        is_new = np.ones(segments.count, bool)
        is_new[first[self.begins] if not own else first] = False
        if not own:
            is_new[last] = False
        is_any = self.sequences < self.cache.sequences
        is_new &= is_any[segments.document[segments.first]]
        tokens = segments.lengths.copy()
        tokens[first] += self.cache.unfinished[self.sequences] * ~self.begins - 1
        before = self.cache.concepts[self.sequences] * ~self.begins
        counts = np.bincount(segments.document[segments.first[is_new]], minlength=len(first))
        # Of each entry's concept, how many of its sequence's concepts stand before it, or with it.
        newest = before[segments.document] + segments.concept - first[segments.document]
        if not own:
            newest -= self.begins[segments.document]
        newest *= is_any[segments.document]
        self.cache.unfinished[self.sequences] = tokens[last]
        self.cache.concepts[self.sequences] = before + counts
        return Reading(self, segments, last, is_new, tokens, before, counts, newest[self.entries.rows])


@dataclass(frozen=True)
class Reading:
    """The concepts of the entries: of each part the unfinished one, then those that its rows open."""

    keys: CachedConcepts
    segments: Segments
    """The parts are its documents."""
    last: np.ndarray
    """int64 [P], each part's last concept."""
    is_new: np.ndarray
    """bool [M], which of them the backbone reads now."""
    tokens: np.ndarray
    """int64 [M], of each concept; 0 where none was unfinished."""
    before: np.ndarray
    """int64 [P], concepts of each part's sequence that the backbone has read before."""
    counts: np.ndarray
    """int64 [P], those that it reads now."""
    newest: np.ndarray
    """int64 [T], how many concepts of its sequence a row sees."""

    @property
    def parts(self) -> np.ndarray:
        """int64, the parts with new concepts."""
        return np.flatnonzero(self.counts)

    def backbone(self, spare: int) -> PooledKeys:
        """The keys of the new concepts, F rows, and of `spare` that belong to no sequence."""
        cache = self.keys.cache
        parts = [
            PoolPart(before, sequence * cache.longest + np.arange(before + count))
            for sequence, before, count in zip(
                self.keys.sequences.tolist(), self.before.tolist(), self.counts.tolist(), strict=True
            )
            if count
        ]
        cache.backbone_forwards += 1
        cache.backbone_rows += int(self.counts.sum())
        if spare:
            parts.append(PoolPart(0, np.full(spare, cache.backbone.places - 1)))
        return PooledKeys(cache.backbone, parts, block_size=1)

    def told(self) -> tuple[np.ndarray, np.ndarray, Sight]:
        """Where in `cache.seen` is written and read, and which of what is read each row sees.

        Written: of sequences that begin the start vectors, then the F new concepts. Read: int64 [K].
        """
        keys = self.keys
        starts = keys.sequences * (keys.cache.longest + 1)
        written = [starts[keys.begins]]
        sizes = self.before + self.counts
        ranges = list(zip(starts.tolist(), self.before.tolist(), sizes.tolist(), strict=True))
        written += [start + 1 + np.arange(before, size) for start, before, size in ranges]
        read = np.concatenate([start + np.arange(1 + size) for start, _, size in ranges])
        edges = np.cumsum([0, *(1 + sizes)])
        mask = BlockDiffusionMask(
            [torch.from_numpy(edges)], 1, block_grid=BlockGrid.sequence, clean_copy=False, causal=True
        )
        of_row = self.segments.document[keys.entries.rows]
        rows = edges[of_row] + self.newest
        rectangle = Rectangle(mask, rows[None], rows[None, :0], few_rows=True)
        return np.concatenate(written), read, Sight(rectangle, read)


def at_of(index: np.ndarray, like: Tensor) -> Tensor:
    """An index of the host, int64, where a tensor is."""
    return sent(torch.from_numpy(np.ascontiguousarray(index)), like.device)
