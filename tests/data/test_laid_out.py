"""Sequences in windows, and what a run leaves of an epoch. Token = 1000 * document + position."""

from collections import Counter

import numpy
import pytest

from llada_megatron.data.laid_out import LaidOut, Pieces, keep_pieces, lay_out
from llada_megatron.data.reading import TokenFiles
from tests.data.test_packed import L, lengths_of, write_corpus

WINDOW = 8


def laid_out(folder, lengths, *, length=L, pieces: Pieces | None = None) -> LaidOut:
    """Of whole documents of these lengths, or of pieces of them."""
    corpus = folder / "corpus"
    if not corpus.with_suffix(".idx").exists():
        write_corpus(corpus, lengths.tolist())
    indices = folder / f"indices_{length}_{pieces is not None}"
    indices.mkdir()
    of = lengths if pieces is None else pieces.lengths.astype(numpy.int32)
    if pieces is not None:
        keep_pieces(indices, pieces)
    numbers = numpy.arange(len(of), dtype=numpy.int32)
    lay_out(indices, of, numbers, name="corpus", split="train", sequence_length=length, seed=5, window=WINDOW)
    return LaidOut(TokenFiles([(str(corpus), "int32", len(lengths))]), indices, 5, window=WINDOW)


@pytest.fixture
def lengths():
    return numpy.array(lengths_of(80), numpy.int32)


def tokens(laid: LaidOut, first: int, end: int) -> list[list[int]]:
    return [laid[index]["tokens"].tolist() for index in range(first, end)]


def tokens_in(pieces: Pieces) -> list[int]:
    parts = zip(pieces.documents, pieces.starts, pieces.lengths, strict=True)
    return [
        1000 * document + token for document, start, size in parts for token in range(start, start + size)
    ]


def test_sequences_are_shuffled_within_windows_anew_in_every_epoch(tmp_path, lengths):
    laid = laid_out(tmp_path, lengths)
    count = laid.sequences_per_epoch
    assert count > 5 * WINDOW and count % WINDOW
    document = [(number, token) for number in laid.document_index for token in range(lengths[number])]
    in_order = [[1000 * n + token for n, token in document[at * L : (at + 1) * L]] for at in range(count)]
    epochs = [tokens(laid, epoch * count, (epoch + 1) * count) for epoch in range(3)]
    for first in range(0, count, WINDOW):
        window = slice(first, min(first + WINDOW, count))
        assert all(sorted(epoch[window]) == sorted(in_order[window]) for epoch in epochs)
    assert len({str(epoch) for epoch in (*epochs, in_order)}) == 4


@pytest.mark.parametrize("epoch", [0, 1])
def test_what_was_read_and_what_was_not_are_the_epoch(tmp_path, lengths, epoch):
    laid = laid_out(tmp_path, lengths)
    count = laid.sequences_per_epoch
    everything = {1000 * number + token for number in range(80) for token in range(lengths[number])}
    for read in (1, WINDOW - 1, WINDOW, 2 * WINDOW + 3, count - 1):
        unread = laid.unread(epoch * count + read, lengths)
        left = tokens_in(unread)
        done = [token for part in tokens(laid, epoch * count, epoch * count + read) for token in part]
        assert Counter([*done, *left]) == Counter(everything)
        cut = len(unread.documents) - len(set(unread.documents.tolist()))
        assert cut <= WINDOW  # documents are whole but for those of one window


def test_pieces_are_laid_out_like_documents_and_leave_pieces(tmp_path, lengths):
    whole = laid_out(tmp_path, lengths)
    unread = whole.unread(21, lengths)
    rest = laid_out(tmp_path, lengths, length=3 * L, pieces=unread)
    count = rest.sequences_per_epoch
    assert count == unread.tokens // (3 * L)
    sequences = tokens(rest, 0, count)
    assert len({token for each in sequences for token in each}) == count * 3 * L
    assert not {token for each in sequences for token in each} & {
        token for each in tokens(whole, 0, 21) for token in each
    }
    for sample in (rest[index] for index in range(count)):
        edges = numpy.flatnonzero(numpy.diff(sample["tokens"]) != 1) + 1
        assert {*edges} <= {*sample["cu_seqlens"].tolist()}
        assert (sample["tokens"][sample["cu_seqlens"][:-1]] // 1000 == sample["document_ids"]).all()
    again = rest.unread(5, lengths)
    left = tokens_in(again)
    done = [token for each in sequences[:5] for token in each]
    before = [token for each in tokens(whole, 0, 21) for token in each]
    assert len({*left, *done, *before}) == len(left) + len(done) + len(before) == lengths.sum()


def test_less_than_a_sequence_is_no_sequence_and_is_not_lost(tmp_path, lengths):
    pieces = Pieces(numpy.array([3, 4]), numpy.array([0, 1]), numpy.array([1, 1]))
    rest = laid_out(tmp_path, lengths, pieces=pieces)
    assert rest.sequences_per_epoch == 0
    left = rest.unread(0, lengths)
    assert [*zip(left.documents, left.starts, left.lengths, strict=True)] == [(3, 0, 1), (4, 1, 1)]
