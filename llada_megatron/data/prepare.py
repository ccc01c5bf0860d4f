"""A corpus on disk: files of text in, Megatron's .bin/.idx out, and the reading of an .idx.

The .bin holds the tokens of every document, one after the other. The .idx holds a header of 34 bytes,
an int32 length and an int64 byte offset per document, and the document numbers.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from llada_megatron.config.errors import BadInput, RunFailed
from llada_megatron.config.flops import DocumentLengths
from llada_megatron.data.containers import CONTAINERS, BadRecord
from llada_megatron.data.durable import write_out
from llada_megatron.data.formats import FORMATS
from llada_megatron.data.sources import Source, find_sources
from llada_megatron.data.tokenizer import Tokenizer, load_tokenizer
from llada_megatron.runtime import interrupts

SIDECAR_VERSION = 1
BLOCK_BYTES = 4 * 2**20
MASK_RULES = ("refuse", "drop", "split")
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document indices
_TOKEN_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}

_SIDECAR_TYPES = {"tokenizer": str, "tokenizer_sha256": str, "vocab_size": int, "tokens": int, "bytes": int}

_worker_tokenizer = functools.cache(load_tokenizer)


@dataclass(frozen=True)
class CorpusIndex:
    """The .idx of a corpus, checked against its .bin; arrays are memory-mapped."""

    prefix: str
    dtype: numpy.dtype[Any]
    document_lengths: numpy.ndarray
    """int32 [documents], in tokens."""
    document_offsets: numpy.ndarray
    """int64 [documents], in bytes of the .bin."""

    @property
    def tokens(self) -> int:
        """Tokens of the corpus."""
        return int(self.document_lengths.sum(dtype=numpy.int64))

    @property
    def log_normal(self) -> DocumentLengths:
        """The log-normal distribution with the mean and deviation of the lengths' logarithms."""
        logs = numpy.log(self.document_lengths[self.document_lengths > 0])
        return DocumentLengths(float(numpy.exp(logs.mean())), max(float(logs.std()), 0.01))


def read_index(prefix: str) -> CorpusIndex:
    """Return the checked index of `prefix`.bin and `prefix`.idx.

    A document is one sequence of the .idx, as in megatron-core's GPTDataset. Raises BadInput when a file
    is missing, truncated, damaged, no .idx, or without tokens.
    """
    bin_path, idx_path = f"{prefix}.bin", f"{prefix}.idx"
    for path in (bin_path, idx_path):
        if not os.path.isfile(path):
            raise BadInput(f"{path} does not exist: data.path names prefixes of .bin/.idx pairs.")
    with open(idx_path, "rb") as file:
        header = file.read(_INDEX_HEADER.size)
    if len(header) < _INDEX_HEADER.size:
        raise BadInput(f"{idx_path} is truncated: it is shorter than its header.")
    magic, version, code, documents, document_indices = _INDEX_HEADER.unpack(header)
    if magic != _INDEX_MAGIC or version != 1 or code not in _TOKEN_DTYPES:
        raise BadInput(f"{idx_path} is not an index of Megatron token ids: its header is unknown.")
    idx_bytes = _INDEX_HEADER.size + 12 * documents + 8 * document_indices
    if os.path.getsize(idx_path) < idx_bytes:
        raise BadInput(
            f"{idx_path} is truncated: {documents} documents need {idx_bytes} bytes, "
            f"it has {os.path.getsize(idx_path)}."
        )
    if documents == 0:
        raise BadInput(f"{idx_path} holds no documents: prepare the corpus again.")
    dtype = numpy.dtype(_TOKEN_DTYPES[code])
    lengths = numpy.memmap(idx_path, "<i4", "r", _INDEX_HEADER.size, (documents,))
    offsets = numpy.memmap(idx_path, "<i8", "r", _INDEX_HEADER.size + 4 * documents, (documents,))
    ends = offsets + lengths * numpy.int64(dtype.itemsize)
    if min(lengths.min(), offsets.min(), ends.min()) < 0 or (offsets % dtype.itemsize).any():
        raise BadInput(f"{idx_path} is damaged: its lengths and offsets name no tokens. Make it again.")
    bin_bytes = int(ends.max())
    if os.path.getsize(bin_path) < bin_bytes:
        raise BadInput(
            f"{bin_path} is truncated: its index needs {bin_bytes} bytes, it has {os.path.getsize(bin_path)}."
        )
    if bin_bytes == 0:
        raise BadInput(f"{bin_path} holds no tokens: prepare the corpus again.")
    return CorpusIndex(prefix, dtype, lengths, offsets)


def read_sidecar(prefix: str) -> dict[str, Any] | None:
    """Return what `prepare_corpus` wrote beside the corpus, or None for a corpus prepared elsewhere.

    Raises BadInput for one that is damaged.
    """
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        head = file.read(2**16)  # someone else's .json of this name may be a corpus itself
    if b'"tokenizer_sha256"' not in head:
        return None
    try:
        sidecar = json.loads(head)
        if all(type(sidecar[key]) is kind for key, kind in _SIDECAR_TYPES.items()):
            return sidecar
    except (ValueError, RecursionError, KeyError, TypeError):
        pass
    raise BadInput(f"{path}, which tells the corpus's tokenizer, is damaged: prepare the corpus again.")


@dataclass(frozen=True)
class Preparation:
    """How text becomes tokens; every field is an option of `llada data prepare`."""

    tokenizer: str = "bytes"
    """`bytes`, or the path of a tokenizer.json."""
    end_of_document: str | None = None
    """The token appended to every document; None: found by name."""
    parse_special: bool = False
    """Names of special tokens in the text become those tokens."""
    format: str = "text"
    """A name of data/formats.py's `FORMATS`."""
    text_field: str = "text"
    mask_token_in_text: str = "refuse"
    """What becomes of a document that holds the mask token, one of `MASK_RULES`: the preparation is refused,
    the document is dropped, or it is split there into documents without it."""
    skip_bad: int = 0
    """Go on without up to this many records that cannot be read."""


def prepare_corpus(
    inputs: Sequence[str | Path],
    output_prefix: Path,
    how: Preparation | None = None,
    *,
    container: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Write `output_prefix`.bin, .idx and .json, and return what the .json says.

    `inputs` and `container` are those of `find_sources`. An end-of-document token is appended to each
    document; documents without text are skipped and counted. The files do not depend on the number of
    `workers` (None: the cores this process may use). `say` gets a line per input, per setting of the
    tokenizer's file that is not followed and per bad record. Raises BadInput when an input cannot be read,
    when more records are bad than `how` allows, contains the mask token where that is refused, when the
    output exists and `overwrite` is not set, or when nothing is left.
    """
    how = how or Preparation()
    final = {suffix: Path(f"{output_prefix}.{suffix}") for suffix in ("bin", "json", "idx")}
    aside = {suffix: Path(f"{path}.partial-{os.getpid()}") for suffix, path in final.items()}
    sources, left_out = find_sources(inputs, [*final.values()], container)
    if not overwrite and (there := [path for path in final.values() if path.exists()]):
        raise BadInput(f"{there[0]} exists already: choose another --output, or replace it by --overwrite.")
    tokenizer = load_tokenizer(how.tokenizer, how.end_of_document)
    if tokenizer.end_of_document_id is None:
        raise BadInput(
            f"Tokenizer file {how.tokenizer} names no end-of-document token that is known here: name the one"
            " that ends a document with --end-of-document TOKEN."
        )
    for sentence in [
        *(
            f"{source.path}: {source.kind}{', its byte order mark left out' * source.marked}"
            for source in sources
        ),
        *(f"{path}: left out" for path in left_out),
        *(f"{how.tokenizer}: {note}" for note in tokenizer.notes),
    ]:
        say(sentence)
    output_prefix.parent.mkdir(parents=True, exist_ok=True)
    try:
        counts = _write_tokens(aside["bin"], aside["idx"], sources, how, tokenizer, workers, say)
        summary = _described(how, tokenizer, sources) | counts
        aside["json"].write_text(json.dumps(summary, indent=1) + "\n")
        write_out(aside.values())
        # An .idx is what makes a .bin a corpus: the old one goes first and the new one comes last,
        # so that no crash pairs the index of one corpus with the tokens of another.
        final["idx"].unlink(missing_ok=True)
        for suffix, path in final.items():
            aside[suffix].rename(path)
        write_out([output_prefix.parent])
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
    return summary


def _described(how: Preparation, tokenizer: Tokenizer, sources: list[Source]) -> dict[str, Any]:
    return {
        "version": SIDECAR_VERSION,
        "tokenizer": how.tokenizer if how.tokenizer == "bytes" else os.path.abspath(how.tokenizer),
        "tokenizer_sha256": tokenizer.sha256,
        "tokenizer_notes": [*tokenizer.notes],
        "vocab_size": tokenizer.vocab_size,
        "end_of_document": tokenizer.end_of_document,
        "end_of_document_id": tokenizer.end_of_document_id,
        "mask_token_id": tokenizer.mask_token_id,
        "parse_special": how.parse_special,
        "format": how.format,
        "mask_token_in_text": how.mask_token_in_text,
        "inputs": dict(Counter(source.kind for source in sources)),
    }


@dataclass(frozen=True)
class _Block:
    """Consecutive records of a file."""

    source: Source
    first: int
    """The number of the first record, from 1."""
    records: list[bytes]
    position: int
    """Bytes of all inputs that were read with it, for the progress bar."""


@dataclass(frozen=True)
class _Encoded:
    """The documents of a block, one after the other."""

    tokens: numpy.ndarray
    lengths: list[int]
    counts: Counter[str]
    bad: list[str]
    """A sentence per record that cannot be read."""


_COUNTED = (
    "documents", "empty_documents", "tokens", "bytes", "bad_records", "special_strings", "unknown_tokens",
    "documents_with_replaced_characters", "documents_with_mask_token",
)  # fmt: skip


def _write_tokens(
    bin_path: Path,
    idx_path: Path,
    sources: list[Source],
    how: Preparation,
    tokenizer: Tokenizer,
    workers: int | None,
    say: Callable[[str], None],
) -> dict[str, int]:
    """Write the .bin and .idx of all sources, in their order, and return the counts and the range of ids."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(bin_path), dtype=dtype)
    counts, lowest, highest = Counter(dict.fromkeys(_COUNTED, 0)), tokenizer.vocab_size, 0
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        total = sum(os.path.getsize(source.path) for source in sources)
        task = progress.add_task("prepare", total=total)
        encode = functools.partial(_encode, how=how, dtype=dtype)
        for block, encoded in _in_order(_blocks(sources), encode, workers):
            counts.update(encoded.counts)
            _allow(encoded.bad, counts["bad_records"], how.skip_bad, say)
            stop = 0
            for length in encoded.lengths:
                builder.add_document(encoded.tokens[stop : stop + length], [length])
                stop += length
            if stop:
                lowest = min(lowest, int(encoded.tokens.min()))
                highest = max(highest, int(encoded.tokens.max()))
            progress.update(task, completed=block.position)
        progress.update(task, completed=total)
    if counts["documents"] == 0:
        raise BadInput(f"The input holds no text ({counts['empty_documents']} empty documents).")
    builder.finalize(str(idx_path))
    return {name: counts[name] for name in _COUNTED} | {"lowest_id": lowest, "highest_id": highest}


def _allow(bad: list[str], so_far: int, allowed: int, say: Callable[[str], None]) -> None:
    """Say which records are left out; `so_far` counts these too. BadInput for the first one too many."""
    for number, sentence in enumerate(bad, so_far - len(bad) + 1):
        if number > allowed:
            raise BadInput(
                f"{sentence}. It is bad record number {number} and --skip-bad allows {allowed}: mend it, or"
                " allow more."
            )
        say(f"left out: {sentence}")


def _blocks(sources: list[Source]) -> Iterator[_Block]:
    """Cut the records of all sources into blocks of a few MiB."""
    before = 0
    for source in sources:
        with open(source.path, "rb") as file:
            records: list[bytes] = []
            number = size = 0
            for number, record in enumerate(source.records(file), 1):
                records.append(record)
                size += len(record) + 1
                if size >= BLOCK_BYTES:
                    yield _Block(source, number - len(records) + 1, records, before + file.tell())
                    records, size = [], 0
            before += os.path.getsize(source.path)
            if records:
                yield _Block(source, number - len(records) + 1, records, before)


def _in_order(
    blocks: Iterator[_Block], encode: Callable[[_Block], _Encoded], workers: int | None
) -> Iterator[tuple[_Block, _Encoded]]:
    """Encode in processes and yield in the order of the blocks, with a bounded number in flight."""
    workers = workers or len(os.sched_getaffinity(0))
    # spawn: a fork of a process that has loaded torch copies its threads' locks.
    context = multiprocessing.get_context("spawn")
    pending: deque[tuple[_Block, Future[_Encoded]]] = deque()
    ended: Exception | None = None
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=interrupts.end_with_parent)
    with pool:
        try:
            while ended is None or pending:
                while ended is None and len(pending) <= 2 * workers:
                    try:
                        block = next(blocks)
                        with interrupts.held_back():  # what is started here leaves signals to this process
                            future = pool.submit(encode, block)
                        pending.append((block, future))
                    except (StopIteration, BadInput, OSError) as why:
                        ended = why  # comes after all that was read before it, whatever the number of workers
                if pending:
                    block, future = pending.popleft()
                    yield block, future.result()
        except BrokenProcessPool as error:
            raise RunFailed(
                "A worker was killed, most likely for want of memory: set fewer --workers."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if ended is not None and not isinstance(ended, StopIteration):
        raise ended


def _encode(block: _Block, how: Preparation, dtype: type[numpy.number]) -> _Encoded:
    tokenizer = _worker_tokenizer(how.tokenizer, how.end_of_document)
    parse, document_of = CONTAINERS[block.source.container].parse, FORMATS[how.format]
    pieces: list[numpy.ndarray] = []
    counts: Counter[str] = Counter()
    bad: list[str] = []
    for number, record in enumerate(block.records, block.first):
        if len(bad) > how.skip_bad:
            break
        try:
            text = document_of(parse(record), how.text_field) if record.strip() else ""
        except BadRecord as phrase:
            bad.append(f"{block.source.place(number)} {phrase}")
            continue
        for ids in _documents(text, block.source.place(number), tokenizer, how, counts):
            pieces.append(numpy.array([*ids, tokenizer.end_of_document_id], dtype=dtype))
    tokens = numpy.concatenate(pieces) if pieces else numpy.zeros(0, dtype)
    counts.update(documents=len(pieces), tokens=tokens.size, bad_records=len(bad))
    return _Encoded(tokens, [piece.size for piece in pieces], counts, bad)


def _documents(
    text: str, place: str, tokenizer: Tokenizer, how: Preparation, counts: Counter[str]
) -> list[list[int]]:
    """Return the ids of each document that a text makes: one, none if it is empty, several if it is split."""
    # JSON may carry half of a surrogate pair, which no UTF-8 can hold.
    utf8 = text.encode(errors="replace")
    encoded = utf8.decode()
    ids = tokenizer.encode(encoded, how.parse_special) if text.strip() else []
    if not ids:
        counts["empty_documents"] += 1
        return []
    documents = [ids]
    if tokenizer.mask_token_id in ids:
        counts["documents_with_mask_token"] += 1
        if how.mask_token_in_text == "refuse":
            raise BadInput(
                f"{place} contains the mask token (id {tokenizer.mask_token_id}), which no clean document may"
                " hold: remove it, or set --mask-token-in-text to drop or split."
            )
        documents = _split(ids, tokenizer.mask_token_id) if how.mask_token_in_text == "split" else []
    if documents:
        counts["bytes"] += len(utf8)
        counts["documents_with_replaced_characters"] += encoded != text
        counts["special_strings"] += tokenizer.special_strings(encoded)
        if tokenizer.unknown_token_id is not None:
            counts["unknown_tokens"] += ids.count(tokenizer.unknown_token_id)
    return documents


def _split(ids: list[int], at: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == at:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if part]
