"""What the family `dlcm` keeps of sequences between forwards, so that each reads new tokens alone.

    encoder, decoder        keys and values of all tokens
    backbone                keys and values of concepts
    attention to concepts   keys and values of concepts, and of the start vector
    detector                the last token's query, for the next one's boundary
    unfinished concept      the sum of its h and their number, and p of its first token
    smoothing               s of the newest concept

Tokens lie in pages, as those of every decoder do. A page has the keys of its tokens, the places of the
concepts that the backbone read with them, and one row of the last three: how its sequence goes on behind the
tokens that were read of it. So a full page says all of its sequence that the pages before it do not, and
sequences that begin alike share both. A concept goes through the backbone once: a mean when the next one
opens, a boundary token at once.

Rows of several sequences lie one after the other, in parts; in front of the rows of a part stands what was
kept of its sequence, as one entry more, so that the functions of model/concepts.py serve entries as they do
tokens. The marked entries are those that something is kept behind: the last one of each page that a part
reads.

Legend: P parts, T rows of all parts, E = P + T entries, Q marked ones, M concepts of the entries, F of them
that are new to the backbone, H hidden size of tokens, Hc of concepts.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from llada_megatron.attention import BlockDiffusionMask, Rectangle
from llada_megatron.attention.keys import KeyPool, PooledKeys, PoolPart
from llada_megatron.config.schema import BlockGrid
from llada_megatron.model.concepts import Segments
from llada_megatron.model.cross_attention import Sight
from llada_megatron.runtime.device import sent

NO_PLACES = np.zeros(0, np.int64)


class ConceptCache:
    """Room for so many pages of `page_size` tokens; page p has the places from p * page_size on.

    Rows that belong to no sequence are of one page behind them, which has a single place and no concepts.
    Concepts take places as the backbone reads them, and give them back when their page begins anew, so their
    room grows to the most that there were at a time.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages, self.page_size = pages, page_size
        self.encoder, self.decoder = (KeyPool(pages * page_size + 1) for _ in range(2))
        self.backbone, self.seen = KeyPool(1), KeyPool(1)
        """A concept has the same place in both. Place 0 is that of rows of no sequence, and of the start
        vector."""
        self.unfinished = np.zeros(pages + 1, np.int64)
        """Of each page the tokens that the unfinished concept has behind it."""
        self.backbone_forwards = self.backbone_rows = 0
        """How often the backbone ran, and the concepts that it read."""
        self._concepts = [NO_PLACES] * (pages + 1)
        self._free: list[int] = []  # a heap: concepts of a sequence mostly follow each other
        self._kept: dict[str, Tensor] = {}

    def concepts_of(self, pages: np.ndarray) -> np.ndarray:
        """int64: the places of the concepts that were read with the tokens of these pages, in order."""
        return np.concatenate([NO_PLACES, *(self._concepts[page] for page in pages.tolist())])

    def begin(self, pages: np.ndarray) -> None:
        """These pages get other tokens."""
        for page in pages.tolist():
            for place in self._concepts[page].tolist():
                heapq.heappush(self._free, place)
            self._concepts[page] = NO_PLACES

    def add(self, page: int, count: int) -> np.ndarray:
        """Places, int64 [count], of more concepts that are read with the tokens of a page."""
        if (missing := count - len(self._free)) > 0:
            before, most = self.backbone.places, self.pages * self.page_size + 1
            places = min(before + max(missing, before // 4, self.page_size), most)
            self.backbone.grow(places)
            self.seen.grow(places)
            self._free += range(before, places)  # higher ones than any that is free, so still a heap
        new = np.array([heapq.heappop(self._free) for _ in range(count)], np.int64)
        self._concepts[page] = np.append(self._concepts[page], new)
        return new

    def kept(self, name: str, like: Tensor) -> Tensor:
        """A row for each page, [pages + 1, *] of like [n, *]; zero where nothing was kept yet."""
        if name not in self._kept:
            self._kept[name] = like.new_zeros(self.pages + 1, *like.shape[1:])
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
        is_row = np.ones(P + T, bool)
        is_row[self.kept] = False
        self.rows = np.flatnonzero(is_row)
        self._order = np.empty(P + T, np.int64)
        self._order[self.kept], self._order[self.rows] = np.arange(P), P + np.arange(T)

    def of(self, kept: Tensor, rows: Tensor) -> Tensor:
        """[E, *] of what was kept, [P, *], and rows [T, *]."""
        return torch.cat([kept, rows]).index_select(0, at_of(self._order, rows))


class CachedConcepts(PooledKeys):
    """The encoder's keys of the rows at hand, with what is kept of their sequences beside.

    A part whose rows begin with the first token of its sequence takes over nothing of one before.

    Attributes:
        begins: bool [P], whether a part does.
        first_entries: int64, the entries that open a concept whatever the detector says.
        marks: int64 [Q], the marked entries.
        part: int64 [Q], the part of each.
    """

    def __init__(self, cache: ConceptCache, parts: Sequence[PoolPart]) -> None:
        super().__init__(cache.encoder, parts, block_size=1)
        self.cache = cache
        firsts = np.array([part.rows for part in parts])
        self.begins = firsts == 0
        self.entries = Entries(np.array([len(part.places) for part in parts]) - firsts)
        self.first_entries = np.sort(np.append(self.entries.kept, self.entries.kept[self.begins] + 1))
        laid = [
            _pages_of(first, part.places, cache) for first, part in zip(firsts.tolist(), parts, strict=True)
        ]
        self._before = np.array([before[-1] if len(before) else cache.pages for before, _, _ in laid])
        self._pages = np.concatenate([pages for _, pages, _ in laid])
        self.part = np.repeat(np.arange(len(parts)), [len(pages) for _, pages, _ in laid])
        self.marks = self.entries.kept[self.part] + np.concatenate([read for _, _, read in laid])
        begun = self._pages != self._before[self.part]
        cache.begin(self._pages[begun])
        self.concepts = [cache.concepts_of(before) for before, _, _ in laid]
        """The places of those of each part's sequence that the backbone has read before."""
        self.is_any = self._pages[np.searchsorted(self.part, np.arange(len(parts)))] < cache.pages
        """bool [P], whether a part is a sequence's."""

    @property
    def of_decoder(self) -> PooledKeys:
        """The decoder's keys of the same rows."""
        return self.within(self.cache.decoder)

    @property
    def marked_rows(self) -> np.ndarray:
        """int64 [Q], the marked entries, which are rows, among the rows."""
        return self.marks - self.part - 1

    def kept(self, name: str, like: Tensor) -> Tensor:
        """What is kept by that name of the sequence of each part, [P, *] of like [n, *]."""
        return self.cache.kept(name, like).index_select(0, at_of(self._before, like))

    def keep(self, name: str, rows: Tensor) -> None:
        """Keep a row [Q, *] behind each marked entry."""
        self.cache.kept(name, rows).index_copy_(0, at_of(self._pages, rows), rows)

    def read(self, opened_E: np.ndarray, *, own: bool) -> Reading:
        """What becomes of the concepts, by the entries that open one, bool [E].

        own: a token sees the concept that it is part of. To be called once: what is kept goes on with it.
        """
        segments, cache, begins = Segments(opened_E, self.entries.kept), self.cache, self.begins
        first = segments.document_starts
        is_new = np.ones(segments.count, bool)
        is_new[first[begins] if not own else first] = False
        if not own:
            is_new[np.append(first[1:], segments.count) - 1] = False
        is_new &= self.is_any[segments.document[segments.first]]
        earlier = cache.unfinished[self._before] * ~begins - 1  # tokens that no entry stands for
        tokens = segments.lengths.copy()
        tokens[first] += earlier
        before = np.array([len(places) for places in self.concepts])
        # Of each entry's concept, how many of its sequence's concepts stand before it, or with it.
        newest = before[segments.document] + segments.concept - first[segments.document]
        if not own:
            newest -= begins[segments.document]
        newest *= self.is_any[segments.document]
        marked = segments.concept[self.marks]
        cache.unfinished[self._pages] = (
            self.marks + 1 - segments.first[marked] + (marked == first[self.part]) * earlier[self.part]
        )
        new = newest[self.marks] - before[self.part]
        added: list[list[np.ndarray]] = [[NO_PLACES] for _ in before]
        for page, part, count in zip(
            self._pages.tolist(), self.part.tolist(), _steps(new, self.part).tolist(), strict=True
        ):
            if count:
                added[part].append(cache.add(page, count))
        places = [np.concatenate(of_part) for of_part in added]
        return Reading(self, segments, is_new, tokens, places, new, newest[self.entries.rows])


@dataclass(frozen=True)
class Reading:
    """The concepts of the entries: of each part the unfinished one, then those that its rows open."""

    keys: CachedConcepts
    segments: Segments
    """The parts are its documents."""
    is_new: np.ndarray
    """bool [M], which of them the backbone reads now."""
    tokens: np.ndarray
    """int64 [M], of each concept; 0 where none was unfinished."""
    places: list[np.ndarray]
    """Of each part those that its new concepts get."""
    new: np.ndarray
    """int64 [Q], how many new concepts of its part are read with the entries up to a mark."""
    newest: np.ndarray
    """int64 [T], how many concepts of its sequence a row sees."""

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [P], the new concepts of each part."""
        return np.array([len(places) for places in self.places])

    @cached_property
    def known(self) -> list[np.ndarray]:
        """The places of all concepts of each part's sequence."""
        pairs = zip(self.keys.concepts, self.places, strict=True)
        return [np.append(before, new) for before, new in pairs]

    @property
    def marked(self) -> np.ndarray:
        """int64 [Q], the concept of each mark."""
        return self.segments.concept[self.keys.marks]

    def summed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which entries, [n], are added to which sums, [n], and which sum is the one up to each mark, [Q].

        The first M sums are those of the concepts. A mark within a concept has one of its own.
        """
        segments, marks = self.segments, self.keys.marks
        first, sums = segments.first[self.marked], self.marked
        (within,) = np.nonzero(marks + 1 - first < segments.lengths[self.marked])
        sums[within] = segments.count + np.arange(len(within))
        ranges = [np.arange(first[mark], marks[mark] + 1) for mark in within]
        entries = np.concatenate([np.arange(len(segments.opened)), *ranges])
        of_ranges = np.repeat(sums[within], [len(each) for each in ranges])
        return entries, np.append(segments.concept, of_ranges), sums

    def backbone(self, spare: int) -> PooledKeys:
        """The keys of the new concepts, F rows, and of `spare` that belong to no sequence."""
        cache = self.keys.cache
        parts = [
            PoolPart(len(known) - count, known)
            for known, count in zip(self.known, self.counts.tolist(), strict=True)
            if count
        ]
        cache.backbone_forwards += 1
        cache.backbone_rows += int(self.counts.sum())
        if spare:
            parts.append(PoolPart(0, np.zeros(spare, np.int64)))
        return PooledKeys(cache.backbone, parts, block_size=1)

    def told(self) -> tuple[np.ndarray, np.ndarray, Sight]:
        """Where in `cache.seen` is written and read, and which of what is read each row sees.

        Written: the start vector if a sequence begins, then the F new concepts. Read: int64 [K].
        """
        start = np.zeros(1, np.int64)
        written = np.concatenate([start[: int(self.keys.begins.any())], *self.places])
        read = np.concatenate([each for known in self.known for each in (start, known)])
        edges = np.cumsum([0, *(1 + len(known) for known in self.known)])
        mask = BlockDiffusionMask(
            [torch.from_numpy(edges)], 1, block_grid=BlockGrid.sequence, clean_copy=False, causal=True
        )
        of_row = self.segments.document[self.keys.entries.rows]
        rows = edges[of_row] + self.newest
        rectangle = Rectangle(mask, rows[None], rows[None, :0], few_rows=True)
        return written, read, Sight(rectangle, read)


def _pages_of(
    first: int, places: np.ndarray, cache: ConceptCache
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a part whose rows begin with token `first`: the pages with tokens before it, those with rows, and
    how many rows there are up to the end of each of the latter."""
    stop, size = len(places), cache.page_size
    if places[0] // size == cache.pages:
        return NO_PLACES, np.array([cache.pages]), np.array([stop])
    pages = places[::size] // size
    ends = np.append(np.arange(first // size + 1, len(pages)) * size, stop)
    return pages[: -(-first // size)], pages[first // size :], ends - first


def _steps(total: np.ndarray, part: np.ndarray) -> np.ndarray:
    """By how much a running total of each part grows, from none."""
    return np.diff(total, prepend=0) + (np.diff(part, prepend=0) > 0) * np.append(0, total[:-1])


def at_of(index: np.ndarray, like: Tensor) -> Tensor:
    """An index of the host, int64, where a tensor is."""
    return sent(torch.from_numpy(np.ascontiguousarray(index)), like.device)
