"""How often a corpus was read, at which sequence lengths, and the sequences that come next.

A run reads a corpus at one L for a while, then perhaps at another. What was read at each is a number of
sequences, and with the seed that says everything: the rest of the epoch is cut at the new L before anything
is read again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy

from llada_megatron.config.schema import DataConfig
from llada_megatron.data.conversations import PackedConversations
from llada_megatron.data.index_cache import filled
from llada_megatron.data.laid_out import INDICES, PIECES, WINDOW, LaidOut, keep_pieces, lay_out
from llada_megatron.data.reading import TokenFiles
from llada_megatron.data.shards import Corpus, cache_of

Read = tuple[int, int]
"""(L, sequences of L tokens that were read), in the order in which they were."""
Member = LaidOut | PackedConversations


class Reading:
    """The sequences of one corpus at one L: first what is left of an epoch, then whole epochs without end."""

    def __init__(self, whole: Member, rest: Member | None, epochs_begun: int) -> None:
        self.whole, self.rest, self._epochs_begun = whole, rest, epochs_begun
        self.left = rest.sequences_per_epoch if rest is not None else 0
        """Sequences of the rest."""

    @property
    def sequences_per_epoch(self) -> int:
        """N: sequences of a whole epoch."""
        return self.whole.sequences_per_epoch

    def __getitem__(self, index: int) -> dict[str, numpy.ndarray]:
        """What a member gives for an index >= 0."""
        if self.rest is not None and index < self.left:
            return self.rest[index]
        return self.whole[self._of_whole(index)]

    def _of_whole(self, index: int) -> int:
        return index - self.left + self._epochs_begun * self.sequences_per_epoch

    def epochs_begun_by(self, count: int) -> int:
        """Epochs of which something was read after `count` sequences of this reading."""
        return max(self._epochs_begun, -(-self._of_whole(count) // self.sequences_per_epoch))

    def open_epoch(self, count: int) -> tuple[Member, int] | None:
        """What was being read after `count` sequences, and its next index; None at the end of an epoch."""
        if self.rest is not None and count < self.left:
            return self.rest, count
        index = self._of_whole(count)
        return (self.whole, index) if index % self.sequences_per_epoch else None


@dataclass(frozen=True)
class Places:
    """Where the indices of a reading lie, and what came before it."""

    whole: Path
    rest: Path | None
    epochs_begun: int


def places_of(data: DataConfig, corpus: Corpus, split: str, seed: int, read: tuple[Read, ...]) -> Places:
    """Build the indices of documents at data.sequence_length that were read before as `read` says.

    For one process: the others are told.
    """
    tokens, length = corpus.tokens_of(split, data.split), data.sequence_length
    identity: dict[str, Any] = {
        "prefix": corpus.entry,
        "index": corpus.digest("idx_sha256"),
        "seed": seed,
        "sequence_length": length,
        "shares": data.split,
        "split": split,
    }
    if tokens // length > WINDOW:
        identity["window"] = WINDOW
    options: dict[str, Any] = {"name": corpus.entry, "split": split, "sequence_length": length, "seed": seed}

    def build_whole(folder: Path) -> None:
        lay_out(folder, corpus.lengths(), corpus.documents_of(split, data.split), **options)

    whole = filled(cache_of(data), identity, INDICES, build_whole)
    if not read:
        return Places(whole, None, 0)
    *earlier, (length_before, count) = read
    data_before = replace(data, sequence_length=length_before)
    before = opened(places_of(data_before, corpus, split, seed, tuple(earlier)), corpus, seed)
    unfinished, rest = before.open_epoch(count), None
    if unfinished is not None:
        member, index = unfinished
        assert isinstance(member, LaidOut)

        def build_rest(folder: Path) -> None:
            pieces = member.unread(index, corpus.lengths())
            keep_pieces(folder, pieces)
            numbers = numpy.arange(len(pieces.lengths), dtype=numpy.int32)
            lay_out(folder, pieces.lengths.astype(numpy.int32), numbers, **options)

        rest = filled(
            cache_of(data), {**identity, "window": WINDOW, "read": read}, (*INDICES, *PIECES), build_rest
        )
    return Places(whole, rest, before.epochs_begun_by(count))


def opened(places: Places, corpus: Corpus, seed: int) -> Reading:
    """The sequences whose indices lie there."""
    tokens = TokenFiles([(each.prefix, each.dtype, each.documents) for each in corpus.shards])
    whole, rest = (LaidOut(tokens, each, seed) if each else None for each in (places.whole, places.rest))
    assert whole is not None
    return Reading(whole, rest, places.epochs_begun)


def conversations(data: DataConfig, corpus: Corpus, split: str, seed: int, read: tuple[Read, ...]) -> Reading:
    """A corpus of conversations, packed here, that was read before as `read` says."""
    documents = corpus.documents_of(split, data.split)
    whole = PackedConversations(corpus.index(), documents, data, seed)
    if not read:
        return Reading(whole, None, 0)
    *earlier, (length, count) = read
    before = conversations(replace(data, sequence_length=length), corpus, split, seed, tuple(earlier))
    unfinished, rest = before.open_epoch(count), None
    if unfinished is not None:
        member, index = unfinished
        assert isinstance(member, PackedConversations)
        rest = PackedConversations(corpus.index(), member.unread(index), data, seed, may_be_empty=True)
    return Reading(whole, rest, before.epochs_begun_by(count))
