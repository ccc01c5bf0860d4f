"""The ids of a corpus against a vocabulary: files of others are read through before a model meets them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy

from llada_megatron.config.errors import BadInput
from llada_megatron.data.corpus import CorpusIndex, read_sidecar
from llada_megatron.parallel.ranks import from_first_rank, gathered, rank, ranks, warn

BLOCK_TOKENS = 2**23
_LARGE_TOKENS = 2**31


@dataclass(frozen=True)
class Outside:
    """Ids of a corpus that a vocabulary does not hold."""

    ids: int
    documents: int
    document: int
    """The first document that holds one, counted from 0."""
    position: int
    """The token of that document, counted from 0."""
    token_id: int


def check_ids(corpus: CorpusIndex, vocab_size: int, cache: Path) -> None:
    """Raise BadInput, on every rank alike, when a document holds an id outside 0..vocab_size - 1.

    Every rank must call it. The ranks share one reading of the .bin, whose result is kept in the folder
    `cache` until the corpus changes; a corpus that was prepared here tells it in its .json.
    """
    limits = numpy.iinfo(corpus.dtype)
    if limits.min >= 0 and limits.max < vocab_size:
        return
    found = from_first_rank(_known_range, corpus, cache)
    if found is None:
        if corpus.tokens > _LARGE_TOKENS:
            warn(f"reading the {corpus.tokens:,} ids of {corpus.prefix}.bin through, once")
        parts = [part for part in gathered(id_range(corpus, rank(), ranks())) if part]
        found = min(part[0] for part in parts), max(part[1] for part in parts)
        if rank() == 0:
            _remember(corpus, cache, found)
    if found[0] < 0 or found[1] >= vocab_size:
        from_first_rank(_refuse, corpus, vocab_size)


def id_range(corpus: CorpusIndex, part: int = 0, parts: int = 1) -> tuple[int, int] | None:
    """Return the lowest and the highest id in one of equal parts of the .bin; None where it is empty."""
    blocks = [(int(block.min()), int(block.max())) for _, block in _blocks(corpus, part, parts)]
    return (min(low for low, _ in blocks), max(high for _, high in blocks)) if blocks else None


def outside(corpus: CorpusIndex, vocab_size: int) -> Outside | None:
    """Return what documents hold outside 0..vocab_size - 1; None when all is inside."""
    starts = corpus.document_offsets // corpus.dtype.itemsize
    order = numpy.argsort(starts, kind="stable")
    starts, lengths = starts[order], corpus.document_lengths[order]
    faulty = numpy.zeros(len(starts), dtype=bool)
    count, first = 0, None
    for begin, block in _blocks(corpus):
        places = begin + numpy.flatnonzero((block < 0) | (block >= vocab_size))
        documents = numpy.searchsorted(starts, places, side="right") - 1
        inside = (documents >= 0) & (places < starts[documents] + lengths[documents])
        places, documents = places[inside], documents[inside]
        if places.size and first is None:
            first = (int(order[documents[0]]), int(places[0] - starts[documents[0]]))
            token_id = int(block[places[0] - begin])
        count += places.size
        faulty[documents] = True
    return Outside(count, int(faulty.sum()), *first, token_id) if first else None


def complaint(corpus: CorpusIndex, found: Outside, vocab_size: int) -> str:
    """What is wrong with a corpus, in a sentence."""
    wrapped = ""
    if corpus.dtype == numpy.int16 and found.token_id < 0:
        wrapped = f" (as uint16 this one would be {found.token_id + 2**16}: such a file may have wrapped)"
    return (
        f"{corpus.prefix}.bin: document {found.document} (counted from 0) holds the id {found.token_id} at "
        f"its token {found.position}{wrapped}; {found.ids} ids in {found.documents} documents are outside "
        f"0..{vocab_size - 1}: tokenize them again"
    )


def _refuse(corpus: CorpusIndex, vocab_size: int) -> None:
    if found := outside(corpus, vocab_size):  # else such ids lie between documents, where nobody reads
        raise BadInput(f"{complaint(corpus, found, vocab_size)}, or set model.vocab_size to theirs.")


def _blocks(corpus: CorpusIndex, part: int = 0, parts: int = 1) -> Iterator[tuple[int, numpy.ndarray]]:
    path = f"{corpus.prefix}.bin"
    tokens = numpy.memmap(path, corpus.dtype, "r", shape=(os.path.getsize(path) // corpus.dtype.itemsize,))
    begin, end = (number * len(tokens) // parts for number in (part, part + 1))
    for start in range(begin, end, BLOCK_TOKENS):
        yield start, tokens[start : min(start + BLOCK_TOKENS, end)]


def _known_range(corpus: CorpusIndex, cache: Path) -> tuple[int, int] | None:
    """What is known of a .bin without reading it."""
    json_path, bin_path = Path(f"{corpus.prefix}.json"), Path(f"{corpus.prefix}.bin")
    sidecar = read_sidecar(corpus.prefix)
    if (
        sidecar
        and sidecar["tokens"] * corpus.dtype.itemsize == bin_path.stat().st_size
        and bin_path.stat().st_mtime_ns <= json_path.stat().st_mtime_ns  # it was written about this one
        and type(sidecar.get("lowest_id")) is type(sidecar.get("highest_id")) is int
    ):
        return sidecar["lowest_id"], sidecar["highest_id"]
    try:
        lowest, highest = json.loads(_record(corpus, cache).read_bytes())
        return int(lowest), int(highest)
    except (OSError, ValueError, TypeError):
        return None


def _remember(corpus: CorpusIndex, cache: Path, found: tuple[int, int]) -> None:
    path = _record(corpus, cache)
    aside = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(found))
        aside.rename(path)
    except OSError:
        pass  # it will be read through again


def _record(corpus: CorpusIndex, cache: Path) -> Path:
    """The file whose name says which .bin and .idx it is about."""
    paths = [os.path.realpath(f"{corpus.prefix}.{suffix}") for suffix in ("bin", "idx")]
    identity = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    return cache / f"ids-{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.json"
