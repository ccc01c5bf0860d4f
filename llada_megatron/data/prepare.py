"""Files of text or conversations in, a corpus out (data/corpus.py)."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from llada_megatron.config.errors import BadInput, RunFailed
from llada_megatron.data.chat import CONVERSATIONS
from llada_megatron.data.containers import CONTAINERS, BadRecord
from llada_megatron.data.documents import Preparation, conversations, documents
from llada_megatron.data.durable import write_out
from llada_megatron.data.shards import described
from llada_megatron.data.sources import Source, find_sources
from llada_megatron.data.tokenizer import Tokenizer, load_tokenizer
from llada_megatron.runtime import interrupts

SIDECAR_VERSION = 1
BLOCK_BYTES = 4 * 2**20


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
    document; documents without text are skipped and counted. Of conversations .roles.bin and .roles.idx are
    written too (data/conversations.py), and nothing is appended. The files do not depend on the number of
    `workers` (None: the cores this process may use). `say` gets a line per input, per setting of the
    tokenizer's file that is not followed and per bad record. Raises BadInput when an input cannot be read,
    when more records are bad than `how` allows, contains the mask token where that is refused, when the
    output exists and `overwrite` is not set, or when nothing is left.
    """
    how = how or Preparation()
    suffixes = ("roles.bin", "roles.idx") if how.format in CONVERSATIONS else ()
    final = {suffix: Path(f"{output_prefix}.{suffix}") for suffix in (*suffixes, "bin", "json", "idx")}
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
        counts = _write_tokens(aside, sources, how, tokenizer, workers, say)
        files = described(_dtype(tokenizer).__name__, counts["documents"], counts["tokens"], aside)
        summary = _said(how, tokenizer, sources) | counts | {"files": files}
        aside["json"].write_text(json.dumps(summary, indent=1) + "\n")
        write_out(aside.values())
        # An .idx is what makes a .bin a corpus: the old one goes first and the new one comes last,
        # so that no crash pairs the index of one corpus with the tokens of another.
        for suffix in ("idx", "roles.idx", "roles.bin"):
            Path(f"{output_prefix}.{suffix}").unlink(missing_ok=True)
        for suffix, path in final.items():
            aside[suffix].rename(path)
        write_out([output_prefix.parent])
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
    return summary


def _said(how: Preparation, tokenizer: Tokenizer, sources: list[Source]) -> dict[str, Any]:
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
        **(
            {"chat_template": how.chat_template, "only_last": how.only_last}
            if how.format in CONVERSATIONS
            else {}
        ),
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
    roles: numpy.ndarray
    """uint8, as many as tokens, of conversations; else none."""
    lengths: list[int]
    counts: Counter[str]
    bad: list[str]
    """A sentence per record that cannot be read."""


_COUNTED = (
    "documents", "empty_documents", "tokens", "bytes", "bad_records", "special_strings", "unknown_tokens",
    "documents_with_replaced_characters", "documents_with_mask_token", "answer_tokens",
)  # fmt: skip


def _write_tokens(
    aside: dict[str, Path],
    sources: list[Source],
    how: Preparation,
    tokenizer: Tokenizer,
    workers: int | None,
    say: Callable[[str], None],
) -> dict[str, int]:
    """Write the pairs of files of all sources, in their order, and return the counts and the range of ids."""
    from llada_megatron.runtime import mcore_cpu

    mcore_cpu.install()  # megatron-core without torch's compiler: 2.6 of 8 s before the first document

    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    dtype = _dtype(tokenizer)
    builder = IndexedDatasetBuilder(str(aside["bin"]), dtype=dtype)
    roles = (
        IndexedDatasetBuilder(str(aside["roles.bin"]), dtype=numpy.uint8) if "roles.bin" in aside else None
    )
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
                if roles is not None:
                    roles.add_document(encoded.roles[stop : stop + length], [length])
                stop += length
            if stop:
                lowest = min(lowest, int(encoded.tokens.min()))
                highest = max(highest, int(encoded.tokens.max()))
            progress.update(task, completed=block.position)
        progress.update(task, completed=total)
    if counts["documents"] == 0:
        raise BadInput(f"The input holds no text ({counts['empty_documents']} empty documents).")
    builder.finalize(str(aside["idx"]))
    if roles is not None:
        roles.finalize(str(aside["roles.idx"]))
    return {name: counts[name] for name in _COUNTED} | {"lowest_id": lowest, "highest_id": highest}


def _dtype(tokenizer: Tokenizer) -> type[numpy.number]:
    from megatron.core.datasets.indexed_dataset import DType

    return DType.optimal_dtype(tokenizer.vocab_size)


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
    parse = CONTAINERS[block.source.container].parse
    documents_of = conversations if how.format in CONVERSATIONS else documents
    pieces: list[numpy.ndarray] = []
    roles: list[numpy.ndarray] = []
    counts: Counter[str] = Counter()
    bad: list[str] = []
    for number, record in enumerate(block.records, block.first):
        if len(bad) > how.skip_bad:
            break
        if not record.strip():
            counts["empty_documents"] += 1
            continue
        place = block.source.place(number)
        try:
            for ids, own_roles in documents_of(parse(record), place, how, counts):
                pieces.append(ids.astype(dtype))
                roles.append(own_roles)
        except BadRecord as phrase:
            bad.append(f"{place} {phrase}")
    tokens = numpy.concatenate(pieces) if pieces else numpy.zeros(0, dtype)
    counts.update(documents=len(pieces), tokens=tokens.size, bad_records=len(bad))
    all_roles = numpy.concatenate(roles) if roles else numpy.zeros(0, numpy.uint8)
    return _Encoded(tokens, all_roles, [piece.size for piece in pieces], counts, bad)
