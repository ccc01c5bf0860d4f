"""The ids of a corpus against a vocabulary: files of others are read through before a model meets them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy

from llada_megatron.config.errors import BadInput
from llada_megatron.data.corpus import CorpusIndex, read_index, read_sidecar
from llada_megatron.data.shards import Corpus, Shard, is_about, remember, remembered_file
from llada_megatron.parallel.ranks import from_first_rank, gathered, rank, ranks, warn

BLOCK_TOKENS = 2**23
_LARGE_TOKENS = 2**31


@dataclass(frozen=True)
class Ids:
    """What ids a .bin holds."""

    lowest: int
    highest: int
    mask_token_id: int
    masked: int
    """How many of them are the mask token; 0 where it is not between the lowest and the highest."""

    def are_good(self, vocab_size: int) -> bool:
        """Whether all are in 0..vocab_size - 1 and none is the mask token."""
        return self.lowest >= 0 and self.highest < vocab_size and not self.masked


@dataclass(frozen=True)
class Outside:
    """Ids of a corpus that a model cannot read or must not."""

    ids: int
    documents: int
    document: int
    """The first document that holds one, counted from 0."""
    position: int
    """The token of that document, counted from 0."""
    token_id: int


def check_ids(corpora: Sequence[Corpus], vocab_size: int, mask_token_id: int, cache: Path) -> None:
    """Raise BadInput, on every rank alike, for an id outside 0..vocab_size - 1 or the mask token.

    Every rank must call it. The ranks share one reading of a .bin, whose result is kept in the folder `cache`
    until the corpus changes; a corpus that was prepared here tells it in its .json.
    """
    shards = [shard for corpus in corpora for shard in corpus.shards]
    known = dict(zip(shards, from_first_rank(_known, shards, vocab_size, mask_token_id, cache), strict=True))
    unknown = [shard for shard, ids in known.items() if ids is None]
    if unknown:
        tokens = sum(shard.tokens for shard in unknown)
        if tokens > _LARGE_TOKENS:
            more = f" and {len(unknown) - 1} other files" if len(unknown) > 1 else ""
            warn(f"reading the {tokens:,} ids of {unknown[0].prefix}.bin{more} through, once")
        parts = gathered([_part(shard, mask_token_id, rank(), ranks()) for shard in unknown])
        read = [_united([part for part in own if part]) for own in zip(*parts, strict=True)]
        if rank() == 0:
            for shard, all_ids in zip(unknown, read, strict=True):
                remember(remembered_file("ids", shard.prefix, cache), astuple(all_ids))
        known |= dict(zip(unknown, read, strict=True))
    for shard, ids in known.items():
        if ids and not ids.are_good(vocab_size):
            from_first_rank(_refuse, shard, vocab_size, mask_token_id)


def id_range(corpus: CorpusIndex) -> tuple[int, int] | None:
    """Return the lowest and the highest id of the .bin; None where it is empty."""
    found = [part for part in [_ids(corpus.prefix, corpus.dtype, -1)] if part]
    return (found[0].lowest, found[0].highest) if found else None


def _part(shard: Shard, mask_token_id: int, part: int, parts: int) -> Ids | None:
    return _ids(shard.prefix, numpy.dtype(shard.dtype), mask_token_id, part, parts)


def _ids(prefix: str, dtype: numpy.dtype, mask_token_id: int, part: int = 0, parts: int = 1) -> Ids | None:
    """The ids in one of equal parts of a .bin; None where it is empty."""
    found = [
        Ids(int(block.min()), int(block.max()), mask_token_id, int((block == mask_token_id).sum()))
        for _, block in _blocks(prefix, dtype, part, parts)
    ]
    return _united(found) if found else None


def _united(parts: Sequence[Ids]) -> Ids:
    return Ids(
        min(part.lowest for part in parts),
        max(part.highest for part in parts),
        parts[0].mask_token_id,
        sum(part.masked for part in parts),
    )


def outside(corpus: CorpusIndex, vocab_size: int) -> Outside | None:
    """Return what documents hold outside 0..vocab_size - 1; None when all is inside."""
    return _found(corpus, lambda block: (block < 0) | (block >= vocab_size))


def _found(corpus: CorpusIndex, is_bad: Callable[[numpy.ndarray], numpy.ndarray]) -> Outside | None:
    starts = corpus.document_offsets // corpus.dtype.itemsize
    order = numpy.argsort(starts, kind="stable")
    starts, lengths = starts[order], corpus.document_lengths[order]
    faulty = numpy.zeros(len(starts), dtype=bool)
    count, first = 0, None
    for begin, block in _blocks(corpus.prefix, corpus.dtype):
        places = begin + numpy.flatnonzero(is_bad(block))
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


def _refuse(shard: Shard, vocab_size: int, mask_token_id: int) -> None:
    """Raise BadInput for what is wrong; ids between documents, where nobody reads, are not."""
    corpus = read_index(shard.prefix)
    if found := outside(corpus, vocab_size):
        raise BadInput(f"{complaint(corpus, found, vocab_size)}, or set model.vocab_size to theirs.")
    if found := _found(corpus, lambda block: block == mask_token_id):
        raise BadInput(
            f"{corpus.prefix}.bin: document {found.document} (counted from 0) contains the mask token"
            f" {mask_token_id} at its token {found.position}, as do {found.documents - 1} others: prepare the"
            " corpus again without it (--mask-token-in-text), change model.mask_token_id, or set"
            " training.bad_samples=skip, which leaves their sequences out."
        )


def _blocks(
    prefix: str, dtype: numpy.dtype, part: int = 0, parts: int = 1
) -> Iterator[tuple[int, numpy.ndarray]]:
    path = f"{prefix}.bin"
    tokens = numpy.memmap(path, dtype, "r", shape=(os.path.getsize(path) // dtype.itemsize,))
    begin, end = (number * len(tokens) // parts for number in (part, part + 1))
    for start in range(begin, end, BLOCK_TOKENS):
        yield start, tokens[start : min(start + BLOCK_TOKENS, end)]


def _known(shards: Sequence[Shard], vocab_size: int, mask_token_id: int, cache: Path) -> list[Ids | None]:
    """What is known of each .bin without reading it."""
    return [
        _of_dtype(shard, vocab_size, mask_token_id)
        or _said(shard, mask_token_id)
        or _remembered(shard, mask_token_id, cache)
        for shard in shards
    ]


def _of_dtype(shard: Shard, vocab_size: int, mask_token_id: int) -> Ids | None:
    """The ids that a dtype can hold, where all of them are good."""
    limits = numpy.iinfo(shard.dtype)
    all_good = limits.min >= 0 and limits.max < vocab_size and mask_token_id > limits.max
    return Ids(int(limits.min), int(limits.max), mask_token_id, 0) if all_good else None


def _said(shard: Shard, mask_token_id: int) -> Ids | None:
    """The ids by what prepared them, which let no mask token of its own pass."""
    sidecar = read_sidecar(shard.prefix)
    token_bytes = numpy.dtype(shard.dtype).itemsize
    if not sidecar or not is_about(shard.prefix, ["bin"], [sidecar["tokens"] * token_bytes]):
        return None
    lowest, highest = (sidecar.get(name) for name in ("lowest_id", "highest_id"))
    if not (type(lowest) is type(highest) is int):
        return None
    is_clean = sidecar.get("mask_token_id") == mask_token_id or not lowest <= mask_token_id <= highest
    return Ids(lowest, highest, mask_token_id, 0) if is_clean else None


def _remembered(shard: Shard, mask_token_id: int, cache: Path) -> Ids | None:
    try:
        ids = Ids(*json.loads(remembered_file("ids", shard.prefix, cache).read_bytes()))
        is_about_mask = ids.mask_token_id == mask_token_id
        return ids if is_about_mask and all(type(each) is int for each in astuple(ids)) else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None
