"""Cuts a rectangle of the mask into tiles for an attention kernel, and gathers tiles into calls.

A chunk is a run of short noise groups, CHUNK_TOKENS together, or one longer group; mostly a block is a group
of its own (mask.py). A row sees three kinds of keys:

    own group    a noisy row: the noisy keys of its group, up to its block
    own chunk    the clean keys of the chunk, a noisy row up to its group, a clean row to the end of its block
    past         the clean keys of its document before the chunk, noisy and clean rows alike

The past is halved as a Fenwick tree halves a prefix. In a document of chunks A to H, G sees A..D together
with H, and E..F together with H. So the past of all chunks of all documents takes one shape of tile for every
power of two. Nothing in it is hidden, and tiles grow to half a document: large products suit kernels best.

Tiles are spans of rows against spans of keys. Rows are ordered in one of two ways. As given: all noisy
tokens, then all clean tokens, each sample by sample. By chunk: chunk by chunk and within it document by
document, the noisy rows, then the clean rows. Keys are as given: all noisy ones, then all clean ones.

Legend: B batch, L data tokens per sequence, n tokens of a rectangle, R rows of the micro-batch, t tiles of a
stage, T tiles of a call, q rows and k keys of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from llada_megatron.attention.mask import BlockDiffusionMask, Rectangle

# Measured on one CPU core, forward and backward, float32.
# 8 heads of 64, 2L = 4096: chunks of 32 and of 64 are equally fast, and 64 takes fewer calls.
CHUNK_TOKENS = 64
# Shorter groups share a tile of own groups.
OWN_GROUP_TOKENS = 16
# From this size of a group on, the rows of one half make tiles that are tall enough: 4% faster than both by
# chunk.
LONG_GROUP_TOKENS = 256
# Query-key pairs that cost as much as one more call, with 4 heads of 32. With 8 heads of 64 and 16 documents
# of about 1024 tokens all from 2048 to 8192 are within 3%.
CALL_PAIRS = 4096
# A call ends at so many rows, and documents are ordered by chunk together until they have so many tokens: the
# buffers stay small. 16 documents of 1024 tokens take 20% longer in one piece.
CALL_ROWS = 4096
SEGMENT_TOKENS = 1024

Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Spans:
    """Spans [start, stop), one per entry."""

    start: Integers
    stop: Integers

    def __getitem__(self, index: npt.NDArray | slice) -> "Spans":
        return Spans(self.start[index], self.stop[index])

    def __add__(self, offset: Integers | int) -> "Spans":
        return Spans(self.start + offset, self.stop + offset)

    def __mul__(self, factor: int) -> "Spans":
        return Spans(self.start * factor, self.stop * factor)

    def followed_by(self, other: "Spans") -> "Spans":
        """The entries of both."""
        return Spans(*(np.concatenate(pair) for pair in ((self.start, other.start), (self.stop, other.stop))))

    @property
    def lengths(self) -> Integers:
        return self.stop - self.start

    def places(self) -> Integers:
        """[entries, longest]: every span counted out, short ones padded with their last place."""
        return self.start[:, None] + np.minimum(np.arange(self.lengths.max()), self.lengths[:, None] - 1)


@dataclass(frozen=True)
class Tiles:
    """Tiles of one stage: every row is in at most one."""

    rows: Spans
    """[t]"""
    keys: Spans
    """[t]"""
    seen: Spans
    """[R]: what the row at each place sees of the keys of its tile."""

    def between(self, start: int, stop: int) -> "Tiles":
        """The tiles of rows [start, stop), counted from start."""
        inside = (self.rows.start >= start) & (self.rows.start < stop)
        return Tiles(self.rows[inside] + -start, self.keys[inside], self.seen[start:stop])


@dataclass(frozen=True)
class TileCall:
    """Tiles padded to one shape. Padding repeats the last row or key of its tile."""

    rows: Integers
    """[T, q]"""
    keys: Integers
    """[T, k]"""
    visible: Booleans | None
    """[T or 1, q or 1, k]; None when nothing is hidden."""
    padding: Booleans | None
    """[T, q], True where a row is padding; None when none is."""

    @property
    def pairs(self) -> int:
        """Query-key pairs that the call computes."""
        return self.rows.size * self.keys.shape[1]

    @property
    def queries(self) -> int:
        """Rows that are not padding."""
        return self.rows.size - (0 if self.padding is None else int(self.padding.sum()))


Stage = list[TileCall]


@dataclass(frozen=True)
class Segment:
    """Some documents in order by chunk: their calls count rows from the first one of the segment."""

    order: Integers
    """The row as given at each place."""
    stages: list[Stage]


@dataclass(frozen=True)
class Tiling:
    """The calls that compute a rectangle, stage by stage: those of segments, then those of rows as given."""

    shared: bool
    """The samples are alike, and the rows and keys are those of one."""
    rows: int
    segments: list[Segment]
    """None, or all rows."""
    stages: list[Stage]

    @property
    def pairs(self) -> int:
        """Query-key pairs that the calls compute."""
        stages = [*self.stages, *(stage for segment in self.segments for stage in segment.stages)]
        return sum(call.pairs for stage in stages for call in stage)


def tiling(rectangle: Rectangle) -> Tiling:
    """Return the calls that compute a rectangle; takes O(B (n + L)) time and memory."""
    mask = rectangle.mask
    arrays = mask.document_start, mask.group_start, rectangle.tokens, rectangle.noisy_keys
    shared = all(bool((array == array[0]).all()) for array in arrays)
    layout = _Layout(rectangle, samples=1 if shared else rectangle.batch)
    by_chunk, as_given = (
        [t for t in tiles if len(t.rows.start)] for tiles in (layout.by_chunk, layout.as_given)
    )
    edges = pairwise(layout.segment_edges.tolist()) if by_chunk else []
    return Tiling(
        shared,
        rectangle.queries * layout.samples,
        [
            Segment(layout.order[start:stop], [_calls(t.between(start, stop)) for t in by_chunk])
            for start, stop in edges
        ],
        [_calls(tiles) for tiles in as_given],
    )


def performed_pairs(mask: BlockDiffusionMask) -> int:
    """Return the query-key pairs that the portable executor computes: hidden ones and padding included."""
    tiled = tiling(mask.whole())
    return tiled.pairs * (mask.batch if tiled.shared else 1)


class _Layout:
    """The tiles of a rectangle, its samples taken for one long sequence."""

    def __init__(self, rectangle: Rectangle, samples: int) -> None:
        self.mask, self.samples = rectangle.mask, samples
        tokens = rectangle.tokens[:samples]
        self.count, self.first_clean_key = tokens.size, rectangle.noisy_keys[:samples].size
        sample = np.arange(samples)[:, None]
        self.first_token = sample * self.mask.length

        def of_tokens(start: Integers, stop: Integers) -> Spans:
            edges = (np.take_along_axis(edge[:samples], tokens, axis=1) for edge in (start, stop))
            return Spans(*((edge + self.first_token).ravel() for edge in edges))

        self.document = of_tokens(self.mask.document_start, self.mask.document_stop)
        self.block = of_tokens(self.mask.block_start, self.mask.block_stop)
        self.group = of_tokens(self.mask.group_start, self.mask.group_stop)
        if self.mask.clean_copy:
            own, first_noisy_key = rectangle.own_block, sample * rectangle.noisy_keys.shape[1]
            edges = ((edge[:samples] + first_noisy_key).ravel() for edge in (own.start, own.stop))
            self.own_block = Spans(*edges)
        self.by_chunk: list[Tiles] = []
        self.as_given: list[Tiles] = []
        if self.mask.clean_copy or self.mask.causal:
            self._growing_sight(rectangle)
        else:
            self._whole_documents()

    def _whole_documents(self) -> None:
        """Every row sees its document; short documents share a tile."""
        starts = self._starts(CHUNK_TOKENS, self.mask.document_start, self.mask.document_stop)
        rows = _runs(np.searchsorted(starts, self.document.start, side="right"))
        keys = Spans(self.document.start[rows.start], self.document.stop[rows.stop - 1])
        self.as_given.append(Tiles(rows, keys, self.document))

    def _growing_sight(self, rectangle: Rectangle) -> None:
        """A row sees its document up to its group, or to the end of its block."""
        self.chunk_start = self._group_starts(CHUNK_TOKENS)
        by_chunk = self.mask.clean_copy and self.mask.group_tokens < LONG_GROUP_TOKENS
        if by_chunk:
            segment_start = self._segment_starts()
            self.chunk_start = np.union1d(self.chunk_start, segment_start)
            first_token = np.searchsorted(self.document.start, segment_start)
            self.segment_edges = np.unique(np.append(first_token, self.count)) * 2
        self.chunk = np.searchsorted(self.chunk_start, self.group.start, side="right") - 1
        chunks = _runs(self.chunk, self.document.start) if rectangle.few_rows else _runs(self.chunk)
        # What the rows see of the clean keys, and its part in their chunk.
        clean_rows = Spans(self.document.start, self.block.stop) + self.first_clean_key
        if (window := rectangle.window) is not None:
            edges = (edge[: self.samples] + self.first_token for edge in (window.start, window.stop))
            clean_rows = Spans(*(edge.ravel() for edge in edges))
        in_chunk = np.maximum(self.document.start, self.chunk_start[self.chunk]) + self.first_clean_key
        own_chunk = Spans(in_chunk[chunks.start], clean_rows.stop[chunks.stop - 1])
        if not self.mask.clean_copy:
            tiles = [(chunks, own_chunk), *self._past()]
            if rectangle.few_rows:
                tiles = self._in_one_piece(tiles, clean_rows)
            self.as_given = [Tiles(*each, clean_rows) for each in tiles]
            return
        noisy_rows = Spans(self.document.start, self.group.start) + self.first_clean_key
        seen = noisy_rows.followed_by(clean_rows)
        has_one_group = self.group.start[chunks.start] == self.group.start[chunks.stop - 1]
        tiles = [(chunks[~has_one_group], own_chunk[~has_one_group]), *self._past()]
        if by_chunk:
            self.order = self._order_by_chunk()
            self.by_chunk = [Tiles(rows * 2, keys, seen[self.order]) for rows, keys in tiles]
        else:
            clean = self.count
            self.as_given = [Tiles(rows + half, keys, seen) for rows, keys in tiles for half in (0, clean)]
        self._own_groups(chunks[has_one_group], own_chunk[has_one_group], clean_rows)
        # A rectangle may leave out tokens of a chunk that come before its only group.
        skipped = Spans(in_chunk, noisy_rows.stop)[chunks.start]
        gap = has_one_group & (skipped.lengths > 0)
        self.as_given.append(Tiles(chunks[gap], skipped[gap], seen))

    def _in_one_piece(self, tiles: list[tuple[Spans, Spans]], seen: Spans) -> list[tuple[Spans, Spans]]:
        """The same tiles, but for documents of few rows: each is one tile of the first stage."""
        documents = _runs(self.document.start)
        is_short = documents.lengths <= max(CHUNK_TOKENS, 2 * self.mask.block_size)
        is_of_short = np.repeat(is_short, documents.lengths)
        (rows, keys), *past = [
            (rows[~is_of_short[rows.start]], keys[~is_of_short[rows.start]]) for rows, keys in tiles
        ]
        short = documents[is_short]
        sight = Spans(seen.start[short.start], seen.stop[short.stop - 1])
        return [(rows.followed_by(short), keys.followed_by(sight)), *past]

    def _own_groups(self, chunks: Spans, own_chunk: Spans, clean_rows: Spans) -> None:
        """Own groups of noisy rows, and own chunks of clean rows where a chunk is one group."""
        runs = _runs(
            np.searchsorted(self._group_starts(OWN_GROUP_TOKENS), self.group.start, side="right"), self.chunk
        )
        noisy = runs[~np.isin(runs.start, chunks.start)].followed_by(chunks)
        noisy_keys = Spans(self.own_block.start[noisy.start], self.own_block.stop[noisy.stop - 1])
        rows = noisy.followed_by(chunks + self.count)
        seen = self.own_block.followed_by(clean_rows)
        self.as_given.append(Tiles(rows, noisy_keys.followed_by(own_chunk), seen))

    def _group_starts(self, tokens: int) -> Integers:
        """First tokens of runs of whole groups of about `tokens`; groups of half as many stand alone."""
        size = self.mask.group_tokens
        step = tokens // size * size if 2 * size < tokens else size
        return self._starts(step, self.mask.group_start, self.mask.group_stop)

    def _starts(self, step: int, start: Integers, stop: Integers) -> Integers:
        """First tokens of runs of whole spans: about one every `step` tokens, and long spans alone.

        start, stop [B, L] are the edges of every token's span.
        """
        spans = Spans(start[: self.samples], stop[: self.samples]) + self.first_token
        long = spans[spans.lengths >= CHUNK_TOKENS]
        starts = np.unique(np.concatenate([spans.start[:, ::step].ravel(), long.start, long.stop]))
        return starts[starts < self.samples * self.mask.length]

    def _segment_starts(self) -> Integers:
        """First tokens of runs of whole documents that are just long enough for a segment."""
        documents = np.unique(self.mask.document_start[: self.samples] + self.first_token)
        starts = [0]
        for document in documents.tolist():
            if document - starts[-1] >= SEGMENT_TOKENS:
                starts.append(document)
        return np.array(starts)

    def _order_by_chunk(self) -> Integers:
        """The row as given at each place in order by chunk, [R]."""
        runs = _runs(self.chunk, self.document.start)
        run, token = np.repeat(np.arange(len(runs.start)), runs.lengths), np.arange(self.count)
        return np.argsort(np.concatenate([runs.start[run] + token, runs.stop[run] + token]))

    def _past(self) -> Iterator[tuple[Spans, Spans]]:
        """By level: tokens of every odd piece of 2^level chunks, and the clean keys of the piece before."""
        first_chunk = np.searchsorted(self.chunk_start, self.document.start, side="right") - 1
        chunk = self.chunk - first_chunk
        for level in range(int(chunk.max()).bit_length()):
            runs = _runs(chunk >> level, self.document.start)
            runs = runs[chunk[runs.start] >> level & 1 == 1]
            stop = first_chunk[runs.start] + (chunk[runs.start] >> level << level)
            start = np.maximum(self.chunk_start[stop - (1 << level)], self.document.start[runs.start])
            yield runs, Spans(start, self.chunk_start[stop]) + self.first_clean_key


def _runs(*arrays: Integers) -> Spans:
    """Runs of neighbours that are equal in every array."""
    changes = np.logical_or.reduce([array[1:] != array[:-1] for array in arrays])
    edges = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(arrays[0])]])
    return Spans(edges[:-1], edges[1:])


def _calls(tiles: Tiles) -> Stage:
    """Gather tiles into calls: large runs of even ones, and the others padded to like shapes."""
    runs = _even_runs(tiles)
    pairs = tiles.rows.lengths * tiles.keys.lengths
    is_view = [int(pairs[run].sum()) >= CALL_PAIRS for run in runs]
    groups = [run for run, view in zip(runs, is_view, strict=True) if view]
    others = [run for run, view in zip(runs, is_view, strict=True) if not view]
    if others:
        groups += _alike(tiles, np.concatenate(others))
    return [_padded(tiles.rows[group], tiles.keys[group], tiles.seen) for group in groups]


def _even_runs(tiles: Tiles) -> list[Integers]:
    """Split tiles into runs of one shape, evenly spaced: a kernel can read their rows and keys in place."""
    q, k = tiles.rows.lengths, tiles.keys.lengths
    by_row = np.argsort(tiles.rows.start)
    features = np.stack([q, k, tiles.rows.start, tiles.keys.start], axis=1)[by_row].tolist()
    runs: list[list[int]] = []
    step = None
    for place, tile in enumerate(features):
        new_step = None
        if runs:
            last = features[place - 1]
            new_step = tile[2] - last[2], tile[3] - last[3]
            fits = tile[:2] == last[:2] and new_step[1] >= 0 and (len(runs[-1]) + 1) * tile[0] <= CALL_ROWS
        if runs and fits and step in (None, new_step):
            runs[-1].append(place)
            step = new_step
        else:
            runs.append([place])
            step = None
    return [by_row[run] for run in runs]


def _alike(tiles: Tiles, members: Integers) -> list[Integers]:
    """Group tiles of like shape; a group ends where its padding costs more than a call."""
    members = members[np.lexsort((-tiles.rows.lengths[members], -tiles.keys.lengths[members]))]
    groups: list[list[int]] = []
    q = k = pairs = 0
    for member in members.tolist():
        rows, keys = int(tiles.rows.lengths[member]), int(tiles.keys.lengths[member])
        q, k, pairs = max(q, rows), max(k, keys), pairs + rows * keys
        padded_rows = (len(groups[-1]) + 1) * q if groups else 0
        if not groups or padded_rows * k - pairs > CALL_PAIRS or padded_rows > CALL_ROWS:
            groups.append([])
            q, k, pairs = rows, keys, rows * keys
        groups[-1].append(member)
    return [np.sort(group) for group in groups]


def _padded(row_spans: Spans, key_spans: Spans, seen: Spans) -> TileCall:
    rows, keys = row_spans.places(), key_spans.places()
    padding = np.arange(rows.shape[1]) >= row_spans.lengths[:, None]
    visible = (np.arange(keys.shape[1]) < key_spans.lengths[:, None])[:, None]  # [T, 1, k]
    seen = seen[rows]
    if (seen.start > key_spans.start[:, None]).any() or (seen.stop < key_spans.stop[:, None]).any():
        key = keys[:, None]
        visible = visible & (key >= seen.start[..., None]) & (key < seen.stop[..., None])  # [T, q, k]
        if (visible == visible[0]).all():
            visible = visible[:1]
    return TileCall(rows, keys, None if visible.all() else visible, padding if padding.any() else None)
