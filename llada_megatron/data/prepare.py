"""A corpus on disk: text or JSONL in, Megatron's .bin/.idx out, and the reading of an .idx.

The .bin holds the tokens of every document, one after the other. The .idx holds a header of 34 bytes,
an int32 length and an int64 byte offset per document, and the document numbers.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from llada_megatron.config.errors import BadInput
from llada_megatron.config.flops import DocumentLengths
from llada_megatron.data.formats import place, reader_of
from llada_megatron.data.tokenizer import load_tokenizer
from llada_megatron.runtime import interrupts

SIDECAR_VERSION = 1
CHUNK_BYTES = 4 * 2**20
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document indices
_TOKEN_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}

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
    is missing, truncated, no .idx, or without tokens.
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
    bin_bytes = int(offsets[-1]) + int(lengths[-1]) * dtype.itemsize
    if os.path.getsize(bin_path) < bin_bytes:
        raise BadInput(
            f"{bin_path} is truncated: its index needs {bin_bytes} bytes, it has {os.path.getsize(bin_path)}."
        )
    if bin_bytes == 0:
        raise BadInput(f"{bin_path} holds no tokens: prepare the corpus again.")
    return CorpusIndex(prefix, dtype, lengths, offsets)


def read_sidecar(prefix: str) -> dict[str, Any] | None:
    """Return what `prepare_corpus` wrote beside the corpus, or None for a corpus prepared elsewhere."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        head = file.read(2**16)  # someone else's .json of this name may be a corpus itself
    try:
        sidecar = json.loads(head)
    except ValueError:
        return None
    return sidecar if isinstance(sidecar, dict) and "tokenizer_sha256" in sidecar else None


def prepare_corpus(
    inputs: list[Path],
    output_prefix: Path,
    tokenizer_name: str = "bytes",
    text_field: str = "text",
    workers: int | None = None,
) -> dict[str, Any]:
    """Write `output_prefix`.bin, .idx and .json, and return what the .json says.

    data/formats.py cuts the inputs into documents. An end-of-document token is appended to each; documents
    without text are skipped and counted. The files do not depend on the number of `workers` (None: the cores
    this process may use). Raises BadInput when an input cannot be read, contains the mask token, or nothing
    is left.
    """
    tokenizer = load_tokenizer(tokenizer_name)
    final = {suffix: Path(f"{output_prefix}.{suffix}") for suffix in ("bin", "json", "idx")}
    aside = {suffix: Path(f"{path}.partial-{os.getpid()}") for suffix, path in final.items()}
    chunks = list(_chunks(inputs, set(final.values())))
    output_prefix.parent.mkdir(parents=True, exist_ok=True)
    summary = {
        "version": SIDECAR_VERSION,
        "tokenizer": tokenizer_name if tokenizer_name == "bytes" else os.path.abspath(tokenizer_name),
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "end_of_document_id": tokenizer.end_of_document_id,
        "mask_token_id": tokenizer.mask_token_id,
    }
    try:
        encode = functools.partial(_encode_chunk, tokenizer_name=tokenizer_name, text_field=text_field)
        summary |= _write_tokens(aside["bin"], aside["idx"], chunks, encode, tokenizer.vocab_size, workers)
        aside["json"].write_text(json.dumps(summary, indent=1) + "\n")
        # An .idx is what makes a .bin a corpus: the old one goes first and the new one comes last,
        # so that no crash pairs the index of one corpus with the tokens of another.
        final["idx"].unlink(missing_ok=True)
        for suffix, path in final.items():
            aside[suffix].rename(path)
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
    return summary


@dataclass(frozen=True)
class _Chunk:
    """The documents of a file that begin in bytes [start, stop)."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Encoded:
    """The documents of a chunk, one after the other."""

    tokens: numpy.ndarray
    lengths: list[int]
    text_bytes: int
    empty: int


def _write_tokens(
    bin_path: Path,
    idx_path: Path,
    chunks: list[_Chunk],
    encode: Callable[..., _Encoded],
    vocab_size: int,
    workers: int | None,
) -> dict[str, int]:
    """Write the .bin and .idx of all chunks, in their order, and return the counts."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    dtype = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(bin_path), dtype=dtype)
    counts = {"documents": 0, "empty_documents": 0, "tokens": 0, "bytes": 0}
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("prepare", total=sum(chunk.stop - chunk.start for chunk in chunks))
        for chunk, encoded in _in_order(chunks, functools.partial(encode, dtype=dtype), workers):
            stop = 0
            for length in encoded.lengths:
                builder.add_document(encoded.tokens[stop : stop + length], [length])
                stop += length
            counts["documents"] += len(encoded.lengths)
            counts["empty_documents"] += encoded.empty
            counts["tokens"] += stop
            counts["bytes"] += encoded.text_bytes
            progress.advance(task, chunk.stop - chunk.start)
    if counts["documents"] == 0:
        raise BadInput(f"The input holds no text ({counts['empty_documents']} empty documents).")
    builder.finalize(str(idx_path))
    return counts


def _chunks(inputs: list[Path], outputs: set[Path]) -> Iterator[_Chunk]:
    if not inputs:
        raise BadInput("No input file is named: give at least one.")
    for path in inputs:
        if not path.is_file():
            raise BadInput(f"Input {path} is not a file.")
        if path in outputs:
            raise BadInput(f"Input {path} would be overwritten: choose another output prefix.")
        size = path.stat().st_size
        for start in range(0, size, CHUNK_BYTES):
            yield _Chunk(str(path), start, min(start + CHUNK_BYTES, size))


def _in_order(
    chunks: list[_Chunk], encode: Callable[[_Chunk], _Encoded], workers: int | None
) -> Iterator[tuple[_Chunk, _Encoded]]:
    """Encode in processes and yield in the order of the chunks, with a bounded number in flight."""
    workers = min(workers or len(os.sched_getaffinity(0)), max(len(chunks), 1))
    # spawn: a fork of a process that has loaded torch copies its threads' locks.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=interrupts.end_with_parent)
    try:
        pending: deque[tuple[_Chunk, Future[_Encoded]]] = deque()
        for next_chunk in chunks:
            with interrupts.held_back():  # what is started here leaves signals to this process
                future = pool.submit(encode, next_chunk)
            pending.append((next_chunk, future))
            if len(pending) > 2 * workers:
                chunk, future = pending.popleft()
                yield chunk, future.result()
        for chunk, future in pending:
            yield chunk, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_chunk(chunk: _Chunk, tokenizer_name: str, text_field: str, dtype: type[numpy.number]) -> _Encoded:
    tokenizer = _worker_tokenizer(tokenizer_name)
    pieces: list[numpy.ndarray] = []
    text_bytes = empty = 0
    for offset, text in reader_of(chunk.path)(chunk.path, chunk.start, chunk.stop, text_field):
        # JSON may carry half of a surrogate pair, which no UTF-8 can hold.
        utf8 = text.encode(errors="replace")
        ids = tokenizer.encode(utf8.decode()) if text.strip() else []
        if not ids:
            empty += 1
            continue
        if tokenizer.mask_token_id in ids:
            raise BadInput(
                f"{place(chunk.path, offset)} contains the mask token (id {tokenizer.mask_token_id}): "
                "remove it from the text, a clean document must not hold it."
            )
        pieces.append(numpy.array([*ids, tokenizer.end_of_document_id], dtype=dtype))
        text_bytes += len(utf8)
    tokens = numpy.concatenate(pieces) if pieces else numpy.zeros(0, dtype)
    return _Encoded(tokens, [piece.size for piece in pieces], text_bytes, empty)
