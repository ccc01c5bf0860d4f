"""Seconds until a run has its data, and milliseconds per sequence read and built, beside other ways.

Start: shards of holes with real indices and what `llada data prepare` says of them. `before` is what every
rank did at every start (an index read through, 66 MiB of the .bin and all of the .idx hashed), measured on a
few shards and multiplied. Reading: a file of random ids, cold after the kernel was told to forget it, with
megatron-core's mapped reader as `before`. Building: bench/building.py.
"""

from __future__ import annotations

import json
import os
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from llada_megatron.bench.building import building
from llada_megatron.config.errors import RunFailed
from llada_megatron.config.schema import DataConfig
from llada_megatron.data.corpus import read_index
from llada_megatron.data.fingerprint import fingerprint
from llada_megatron.data.packed import build_sequences
from llada_megatron.data.reading import Piece, TokenFiles
from llada_megatron.data.shards import described, sampled_sha256, whole_sha256
from llada_megatron.data.tokenizer import ByteTokenizer
from llada_megatron.record.json_files import write_json

DTYPE = np.dtype("uint16")
BEFORE_SHARDS = 40
DOCUMENT_TOKENS, LENGTH = 665, 4096
START_LENGTH = 2**18
"""Of the start: indices of trillions of tokens at 4096 take more memory than a small machine has."""
SAMPLES = 40
BUILT = (4096, 32768)
"""Lengths of sequences of which micro-batches are built."""


def run(shards: int, shard_gb: float, documents: int, directory: Path | None, json_file: Path | None) -> int:
    """Measure, print and write the figures; 0, since there are no limits to them."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        found = {"start": start(Path(folder), shards, round(shard_gb * 1e9), documents)}
        found["reading"] = reading(Path(folder))
    found["building"] = {name: value for length in BUILT for name, value in building(length).items()}
    for part, figures in found.items():
        print(part)
        for name, value in figures.items():
            print(f"  {name:<58} {value:>12.4g}")
    write_json(json_file, {"shards": shards, "shard_gb": shard_gb, "documents": documents, **found})
    return 0


def start(folder: Path, shards: int, shard_bytes: int, documents: int) -> dict[str, float]:
    """Seconds of each way to begin."""
    own = folder / "shards"
    own.mkdir()
    lengths = np.full(documents, shard_bytes // DTYPE.itemsize // documents, "<i4")
    prefixes = [str(own / f"shard_{number:05d}") for number in range(shards)]
    for prefix in prefixes:
        write_index(prefix, lengths)
        with open(f"{prefix}.bin", "wb") as file:
            file.truncate(shard_bytes)
    files = {suffix: Path(f"{prefixes[0]}.{suffix}") for suffix in ("bin", "idx")}
    tokens = int(lengths.sum(dtype=np.int64))
    said: dict[str, Any] = {
        "tokenizer": "bytes",
        "tokenizer_sha256": ByteTokenizer.sha256,
        "vocab_size": 258,
        "bytes": 1,
    }
    said |= {"tokens": tokens, "files": described(DTYPE.name, documents, tokens, files)}
    for prefix in prefixes:
        Path(f"{prefix}.json").write_text(json.dumps(said))

    def before() -> None:
        for prefix in prefixes[:BEFORE_SHARDS]:
            read_index(prefix)
            sampled_sha256(f"{prefix}.bin")
            whole_sha256(f"{prefix}.idx")

    data = DataConfig(path=[str(own)], sequence_length=START_LENGTH, cache_dir=str(folder / "cache"))
    of_others = replace(data, path=[str(folder / "others")])
    (folder / "others").mkdir()
    for prefix in prefixes[:BEFORE_SHARDS]:
        for suffix in ("bin", "idx"):
            os.link(f"{prefix}.{suffix}", folder / "others" / f"{Path(prefix).name}.{suffix}")
    times = shards / len(prefixes[:BEFORE_SHARDS])

    def build() -> None:
        build_sequences(data, split="train", seed=1, vocab_size=2**17, mask_token_id=2**16)

    return {
        "before: fingerprint, every rank, every start, s": seconds(before) * times,
        "after: fingerprint, prepared here, rank 0, s": seconds(lambda: fingerprint(data)),
        "after: fingerprint, of others, rank 0 of the first start, s": seconds(lambda: fingerprint(of_others))
        * times,
        "after: fingerprint, of others, rank 0 of later starts, s": seconds(lambda: fingerprint(of_others))
        * times,
        "after: sequences, indices are built, s": seconds(build),
        "after: sequences, indices are there, s": seconds(build),
    }


def reading(folder: Path, tokens: int = 2**29) -> dict[str, float]:
    """Milliseconds per sequence of LENGTH tokens, whose documents lie anywhere in a file."""
    prefix = str(folder / "text")
    random = np.random.default_rng(1)
    lengths = np.maximum(1, random.lognormal(np.log(DOCUMENT_TOKENS), 1.0, tokens // DOCUMENT_TOKENS // 2))
    write_index(prefix, lengths.astype("<i4"))
    with open(f"{prefix}.bin", "wb") as file:
        for _ in range(0, int(lengths.astype("<i4").sum()), 2**24):
            file.write(random.integers(0, 2**16, 2**24, np.uint16).tobytes())
        os.fsync(file.fileno())
    samples = [sample_of(lengths.astype(int), random) for _ in range(2 * SAMPLES)]
    mapped = IndexedDataset(prefix)
    files = TokenFiles([(prefix, DTYPE.name, len(lengths))])

    def by_mapping(pieces: Sequence[Piece]) -> np.ndarray:
        return np.concatenate([mapped.get(*piece) for piece in pieces])

    def by_position(pieces: Sequence[Piece]) -> np.ndarray:
        return np.concatenate(files.read(pieces))

    if any((by_mapping(pieces) != by_position(pieces)).any() for pieces in samples):
        raise RunFailed("The two readers do not agree: this is a bug of ours.")
    found = {}
    for number, (name, read) in enumerate({"before, mapped": by_mapping, "after": by_position}.items()):
        del mapped  # what is mapped is not forgotten
        forget(prefix)
        mapped = IndexedDataset(prefix)
        for state in ("cold", "warm"):
            own = [1e3 * seconds(lambda: read(pieces)) for pieces in samples[number::2]]  # noqa: B023
            found[f"{name}, {state}: median ms"] = statistics.median(own)
            found[f"{name}, {state}: mean ms"] = statistics.mean(own)
    return found


def sample_of(lengths: np.ndarray, random: np.random.Generator) -> list[Piece]:
    """Documents drawn from anywhere, the last one cut where the sequence is full."""
    pieces: list[Piece] = []
    left = LENGTH
    while left:
        document = int(random.integers(len(lengths)))
        count = min(left, int(lengths[document]))
        pieces.append((document, 0, count))
        left -= count
    return pieces


def forget(prefix: str) -> None:
    """Drop a corpus from the page cache."""
    for suffix in ("bin", "idx"):
        file = os.open(f"{prefix}.{suffix}", os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def write_index(prefix: str, lengths: np.ndarray) -> None:
    """The .idx of documents that lie one after the other."""
    count = len(lengths)
    offsets = np.concatenate(([0], np.cumsum(lengths[:-1], dtype="<i8"))) * DTYPE.itemsize
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, count, count + 1)
    arrays: list[Any] = [lengths.astype("<i4"), offsets.astype("<i8"), np.arange(count + 1, dtype="<i8")]
    Path(f"{prefix}.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
