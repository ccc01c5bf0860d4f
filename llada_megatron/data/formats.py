"""Files of text, cut into documents: one reader per format, named by the ending of its files in `READERS`.

A reader yields (offset, text) of every document that begins in bytes [start, stop) of a file, in order, so
that several processes share one large file: whatever the ranges, each document is read once. `offset` is the
byte where the document begins, and names it in messages; an empty text is skipped and counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from llada_megatron.config.errors import BadInput

Reader = Callable[[str, int, int, str], Iterator[tuple[int, str]]]
"""(path, start, stop, text field) -> documents. Raises BadInput naming the `place` of what it cannot read."""


def json_lines(path: str, start: int, stop: int, text_field: str) -> Iterator[tuple[int, str]]:
    """One document a line, in the field `text_field`."""
    with open(path, "rb") as file:
        if start > 0:  # the line that began before this range belongs to the one before
            file.seek(start - 1)
            file.readline()
        while (offset := file.tell()) < stop:
            line = file.readline()
            yield offset, _text_of(line, text_field, path, offset) if line.strip() else ""


def whole_file(path: str, start: int, stop: int, text_field: str) -> Iterator[tuple[int, str]]:
    """The file is one document in UTF-8; it begins in the range that holds byte 0."""
    if start > 0:
        return
    try:
        yield 0, Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 at byte {error.start}: convert it.") from error


READERS: dict[str, Reader] = {".jsonl": json_lines}


def reader_of(path: str) -> Reader:
    """The reader for a file's ending; a file of any other ending is one document."""
    return READERS.get(Path(path).suffix, whole_file)


def place(path: str, offset: int) -> str:
    """Name the document at a byte offset; its number is its line, so lines are counted only for errors."""
    reader = reader_of(path)
    if reader is whole_file:
        return f"{path}, document 1"
    if reader is not json_lines:
        return f"{path}, the document at byte {offset}"
    line = 1
    with open(path, "rb") as file:
        while offset > 0 and (block := file.read(min(offset, 2**20))):
            line += block.count(b"\n")
            offset -= len(block)
    return f"{path}, document {line} (line {line})"


def _text_of(line: bytes, text_field: str, path: str, offset: int) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise BadInput(f"{place(path, offset)} is not JSON: {error}.") from error
    if not isinstance(record, dict) or text_field not in record:
        raise BadInput(f"{place(path, offset)} has no field {text_field!r}: set --text-field.")
    if not isinstance(record[text_field], str):
        raise BadInput(f"{place(path, offset)}: the field {text_field!r} is not a string.")
    return record[text_field]
