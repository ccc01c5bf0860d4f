"""Documents laid end to end and cut at L: the sequences of one corpus, and what of them has not been read.

    index i --> epoch e, position p = divmod(i, N) --> the shuffle of p's window --> L tokens, their documents

The documents of a split are shuffled once and laid end to end; every L tokens are one sequence and the tail
of fewer than L is left out. Sequences are shuffled within windows of WINDOW, so what a run has not read of an
epoch is a part of one window and all after it, in pieces as long as the documents: a stage with another L
lays out the rest without a cut that was not there before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from llada_megatron.data.index_cache import loaded
from llada_megatron.data.packing import permutation
from llada_megatron.data.reading import TokenFiles

SPLITS = {"train": Split.train, "validation": Split.valid}
INDICES = ("document_index", "sample_index", "shuffle_index")
PIECES = ("piece_documents", "piece_starts", "piece_lengths")
WINDOW = 2**16
"""Sequences that are shuffled among each other; part of the identity of every order."""


@dataclass(frozen=True)
class Pieces:
    """Parts of documents, each int64 [pieces]; nothing is said of their order."""

    documents: numpy.ndarray
    starts: numpy.ndarray
    """First token of each in its document."""
    lengths: numpy.ndarray
    """Tokens, 1 or more."""

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


class LaidOut:
    """The sequences of whole documents, or of pieces: endless, each epoch in an order of its own."""

    def __init__(self, tokens: TokenFiles, indices: Path, seed: int, *, window: int = WINDOW) -> None:
        """indices: a folder that `lay_out` has filled with this window."""
        self._tokens, self._seed, self._window = tokens, seed, window
        self.document_index, self.sample_index, self.shuffle_index = (
            loaded(indices, part) for part in INDICES
        )
        self._pieces = None
        if any(indices.glob(f"*-{PIECES[0]}.npy")):
            self._pieces = Pieces(*(loaded(indices, part) for part in PIECES))
        self._order: tuple[tuple[int, int], numpy.ndarray] = ((0, 0), numpy.empty(0, numpy.int64))

    @property
    def sequences_per_epoch(self) -> int:
        """N: sequences of L tokens."""
        return self.sample_index.shape[0] - 1

    def __getitem__(self, index: int) -> dict[str, numpy.ndarray]:
        """Return tokens [L], cu_seqlens [pieces + 1] and document_ids [pieces] of an index >= 0."""
        epoch, position = divmod(int(index), self.sequences_per_epoch)
        place = int(self._places(epoch, position, position + 1)[0])
        # A sequence begins in the document at place `first` of the order, at one of its tokens.
        (first, begin), (last, end) = self.sample_index[place : place + 2].tolist()
        numbers = self.document_index[first : last + 1]
        begins, ends = [0] * len(numbers), [None] * (len(numbers) - 1) + [end]
        begins[0] = begin
        documents, pieces = numbers.tolist(), self._pieces
        if pieces is not None:
            documents = pieces.documents[numbers].tolist()
            lengths, starts = pieces.lengths[numbers].tolist(), pieces.starts[numbers].tolist()
            ends = [
                start + (length if end is None else end)
                for start, length, end in zip(starts, lengths, ends, strict=True)
            ]
            begins = [start + begin for start, begin in zip(starts, begins, strict=True)]
        parts = self._tokens.read(
            [
                (document, begin, None if end is None else end - begin)
                for document, begin, end in zip(documents, begins, ends, strict=True)
            ]
        )
        sizes = numpy.array([len(part) for part in parts])
        # A sequence that starts where a document ends lists that document with no tokens.
        occupied = numpy.flatnonzero(sizes)
        edges = numpy.cumsum(sizes[occupied])
        return {
            "tokens": numpy.concatenate(parts, dtype=numpy.int64),
            "cu_seqlens": numpy.concatenate(([0], edges)).astype(numpy.int32),
            "document_ids": numpy.array(documents, numpy.int64)[occupied],
        }

    def unread(self, count: int, document_lengths: numpy.ndarray) -> Pieces:
        """What the first `count` sequences leave of the epoch in which they end, its tail included.

        document_lengths: int [documents] of the corpus, in tokens.
        """
        epoch, position = divmod(count, self.sequences_per_epoch) if count else (0, 0)
        sequences = self.sequences_per_epoch
        window_end = min(sequences, -(-position // self._window) * self._window)
        places = numpy.sort(self._places(epoch, position, window_end))
        whole = self._pieces
        lengths = document_lengths if whole is None else whole.lengths
        entries = [self._entries(begin, end, lengths) for begin, end in _runs(places, window_end, sequences)]
        numbers, starts, counts = (numpy.concatenate(part) for part in zip(*entries, strict=True))
        if whole is not None:
            numbers, starts = whole.documents[numbers], starts + whole.starts[numbers]
        return Pieces(numbers, starts, counts)

    def _entries(self, begin: int, end: int, lengths: numpy.ndarray) -> tuple[numpy.ndarray, ...]:
        """Numbers, first tokens and lengths, each int64, of what lies in the sequences [begin, end).

        With the tail where end is the last sequence's.
        """
        first, start = self.sample_index[begin].tolist()
        last, stop = self.sample_index[end].tolist()
        if end == self.sequences_per_epoch:
            last, stop = len(self.document_index) - 1, None
        numbers = self.document_index[first : last + 1].astype(numpy.int64)
        starts, stops = numpy.zeros_like(numbers), lengths[numbers].astype(numpy.int64)
        starts[0] = start
        if stop is not None:
            stops[-1] = stop
        some = stops > starts
        return numbers[some], starts[some], (stops - starts)[some]

    def _places(self, epoch: int, begin: int, end: int) -> numpy.ndarray:
        """Which sequences of the cut come at the positions [begin, end), of one window, of an epoch."""
        if not epoch or begin == end:
            return self.shuffle_index[begin:end]
        window = begin // self._window
        first = window * self._window
        known, order = self._order  # taken at once: several threads may read
        if known != (epoch, window):
            order = permutation(
                self._seed, epoch, min(self._window, self.sequences_per_epoch - first), window
            )
            self._order = (epoch, window), order
        return self.shuffle_index[first + order[begin - first : end - first]]


def _runs(places: numpy.ndarray, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Sorted places below `begin`, and all of [begin, end), as the fewest ranges [first, last)."""
    for run in numpy.split(places, numpy.flatnonzero(numpy.diff(places) != 1) + 1) if len(places) else ():
        first, last = int(run[0]), int(run[-1]) + 1
        if last == begin:
            begin = first
        else:
            yield first, last
    yield begin, end


def lay_out(
    folder: Path,
    lengths: numpy.ndarray,
    numbers: numpy.ndarray,
    *,
    name: str,
    split: str,
    sequence_length: int,
    seed: int,
    window: int = WINDOW,
) -> None:
    """Fill a folder with megatron-core's indices of those `numbers` of documents, of int32 lengths [D]."""
    if int(lengths[numbers].sum(dtype=numpy.int64)) < sequence_length:
        arrays: list[Any] = [numbers, numpy.zeros((1, 2)), numpy.empty(0)]
        for part, array in zip(INDICES, arrays, strict=True):
            numpy.save(folder / f"none-{part}.npy", array.astype(numpy.int32))
        (folder / "none-description.txt").write_text("less than one sequence\n")
        return
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([name], None),
        split="1,0",
        path_to_cache=str(folder),
        # The dataset never tokenizes; megatron-core asks this object for its size and its identity only.
        tokenizer=SimpleNamespace(vocab_size=None, unique_identifiers={}),
        add_extra_token_to_sequence=False,
        create_attention_mask=False,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    documents = SimpleNamespace(sequence_lengths=lengths, path_prefix=name)
    GPTDataset(documents, name, numbers, None, SPLITS[split], config)
    (path,) = folder.glob("*-shuffle_index.npy")
    shuffled = numpy.load(path, allow_pickle=False)
    if len(shuffled) > window:  # its own order, window by window
        numpy.save(path, shuffled[numpy.argsort(shuffled // window, kind="stable")])


def keep_pieces(folder: Path, pieces: Pieces) -> None:
    """Write which pieces the numbers of a folder's indices mean."""
    for part, array in zip(PIECES, (pieces.documents, pieces.starts, pieces.lengths), strict=True):
        numpy.save(folder / f"pieces-{part}.npy", array)
