"""Files cut into records, each as bytes: what a file is made of. What a record means is data/formats.py's.

    file -> packing (gzip, ...) -> container (lines, ...) -> records -> format -> documents

A container is recognised by its content in data/sources.py; `CONTAINERS` lists them.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from llada_megatron.config.errors import BadInput

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Record = dict[str, Any] | str
"""An object of fields, or plain text."""

MAX_RECORD_BYTES = 2**30
"""Of one line, or of one file that is read whole."""


class BadRecord(Exception):
    """A record that cannot be read, as a phrase about it: `--skip-bad` may go on without it."""


@dataclass(frozen=True)
class Packing:
    """How a file is compressed."""

    magic: bytes
    """The file begins with it."""
    unpacked: Callable[[IO[bytes]], Any]


PACKINGS: dict[str, Packing] = {
    "gzip": Packing(b"\x1f\x8b", gzip.open),
    "zstd": Packing(b"\x28\xb5\x2f\xfd", zstd.ZstdFile),
    "xz": Packing(b"\xfd7zXZ\x00", lzma.LZMAFile),
    "bzip2": Packing(b"BZh", bz2.BZ2File),
}

UNPACKING_ERRORS = (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)
"""Of a file that is cut off or damaged; gzip and bz2 also raise an OSError without a number."""


@dataclass(frozen=True)
class Container:
    """A way to keep records in a file."""

    name: str
    """For people: "JSON lines"."""
    unit: str
    """What a record is called in messages: `a.jsonl, line 3`. Empty where the file is one record."""
    records: Callable[[IO[bytes], str], Iterator[bytes]]
    """(file, its path for messages) -> each record; empty ones too. Raises BadInput where it cannot go on."""
    parse: Callable[[bytes], Record]
    """Of a record that is not empty. Raises BadRecord."""


def lines(file: IO[bytes], path: str) -> Iterator[bytes]:
    """One record a line; the end of the line may be CRLF."""
    number = 1
    while line := file.readline(MAX_RECORD_BYTES + 1):
        if len(line) > MAX_RECORD_BYTES:
            raise BadInput(f"{path}, line {number} is longer than 1 GiB: no document is; cut it.")
        yield line.strip()
        number += 1


def whole_file(file: IO[bytes], path: str) -> Iterator[bytes]:
    """The file is one record."""
    content = file.read(MAX_RECORD_BYTES + 1)
    if len(content) > MAX_RECORD_BYTES:
        raise BadInput(f"{path} is larger than 1 GiB: cut it into documents, one a line of JSON.")
    yield content


def json_value(file: IO[bytes], path: str) -> Iterator[bytes]:
    """The file is one JSON value: a list of records, or a single one over several lines."""
    (content,) = whole_file(file, path)
    try:
        value = json.loads(content.decode(), object_pairs_hook=_unique)
        records = [json.dumps(record) for record in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError) as error:
        raise BadInput(
            f"{path} is not one JSON value ({error}): mend it, or write one record a line"
            " (jq -c '.[]' of a list, jq -c . of records over several lines)."
        ) from error
    yield from (record.encode() for record in records)


def parquet(file: IO[bytes], path: str) -> Iterator[bytes]:
    """One record a row; values that JSON does not know (bytes, dates) are null. Needs pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"{path} is a parquet file, which needs pyarrow: pip install pyarrow.") from None
    try:
        # One thread of ours reads while others encode; small batches bound what it holds.
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256, use_threads=False)
        for batch in batches:
            for row in batch.to_pylist():
                yield json.dumps(row, default=lambda value: None).encode()
    except (
        pyarrow.ArrowException,
        ValueError,
        OverflowError,
    ) as error:  # strings and dates, when they are read
        raise BadInput(f"{path} is cut off or damaged (parquet: {error}): fetch it again.") from error


def json_object(record: bytes) -> Record:
    """A record in JSON, which must be an object. Of a key that comes twice, nobody knows which was meant."""
    try:
        value = json.loads(record.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise BadRecord("is nested too deep for JSON") from None
    except UnicodeDecodeError as error:
        raise BadRecord(f"is not UTF-8 at its byte {error.start}") from None
    except ValueError as error:
        raise BadRecord(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRecord("is not a JSON object")
    return value


def utf8_text(record: bytes) -> Record:
    """A record that is text. NUL is none: such a file is binary, or UTF-16."""
    try:
        text = record.decode()
    except UnicodeDecodeError as error:
        raise BadRecord(f"is not UTF-8 at byte {error.start}: convert it") from None
    if (place := text.find("\0")) >= 0:
        raise BadRecord(f"holds a NUL at character {place}: it is binary, or UTF-16; convert it")
    return text


CONTAINERS: dict[str, Container] = {
    "lines": Container("JSON lines", "line", lines, json_object),
    "json": Container("JSON", "record", json_value, json_object),
    "parquet": Container("parquet", "row", parquet, json_object),
    "text": Container("text", "", whole_file, utf8_text),
}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return fields
