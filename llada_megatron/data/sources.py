"""The inputs of a preparation: which files they name, and what each is, read from its content.

A name decides nothing, but a file that is called JSON and is none is refused rather than taken as text.
"""

from __future__ import annotations

import codecs
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llada_megatron.config.errors import BadInput
from llada_megatron.data.containers import CONTAINERS, PACKINGS, UNPACKING_ERRORS

_HEAD_BYTES = 2**16
_JSON_NAME = re.compile(r"\.(json|jsonl|jsonlines|ndjson)(\.|$)", re.IGNORECASE)
_RECORD_ON_A_LINE = re.compile(rb'\s*\{[ \t]*["}]')
_RECORD_OVER_LINES = re.compile(rb'\s*\{\s*"')
_LIST_OF_RECORDS = re.compile(rb"\s*\[\s*[{\]]")
_UNREADABLE = {
    b"PK\x03\x04": "a zip archive: unpack it",
    codecs.BOM_UTF16_LE: "UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    codecs.BOM_UTF16_BE: "UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
}


@dataclass(frozen=True)
class Source:
    """One input file and what it was taken for."""

    path: str
    packing: str
    """A name of `PACKINGS`; empty when it is not compressed."""
    container: str
    """A name of `CONTAINERS`."""
    marked: bool = False
    """It begins with a byte order mark of UTF-8, which is no text."""
    empty: bool = False

    @property
    def kind(self) -> str:
        """For people: "JSON lines, gzip"."""
        if self.empty:
            return "empty"
        return CONTAINERS[self.container].name + (f", {self.packing}" if self.packing else "")

    def place(self, number: int) -> str:
        """Name a record by its number from 1."""
        unit = CONTAINERS[self.container].unit
        return f"{self.path}, {unit} {number}" if unit else self.path

    def records(self, file: IO[bytes]) -> Iterator[bytes]:
        """The records of the file, opened as it lies on disk; raises BadInput where it is damaged."""
        try:
            with _unpacked(file, self.packing) as content:
                if self.marked:
                    content.read(len(codecs.BOM_UTF8))
                yield from CONTAINERS[self.container].records(content, self.path)
        except (*UNPACKING_ERRORS, OSError) as error:
            raise _damaged(self.path, self.packing, error) from error


def find_sources(
    inputs: Sequence[str | Path], outputs: Sequence[Path], container: str | None = None
) -> tuple[list[Source], list[str]]:
    """Return the input files in their order, and paths in folders that were left out.

    An input is a file, a folder (its files at any depth, sorted) or a glob pattern (sorted). In folders,
    names that begin with `.` or `_` and links to folders are left out. `container` is taken for all of them
    instead of what their content says. Raises BadInput for what is not there, is no text, would be
    overwritten, or is named twice under whatever names.
    """
    if not inputs:
        raise BadInput("No input file is named: give at least one.")
    left_out: list[str] = []
    paths = [path for each in inputs for path in _files(str(each), left_out)]
    seen: dict[tuple[int, int], str] = {}
    written = {(status.st_dev, status.st_ino) for path in outputs if (status := _status(path))}
    for path in paths:
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        if identity in written:
            raise BadInput(f"Input {path} would be overwritten: choose another output prefix.")
        if identity in seen:
            raise BadInput(f"Input {path} is the same file as {seen[identity]}: name it once.")
        seen[identity] = path
    return [_look(path, container) for path in paths], left_out


def _files(name: str, left_out: list[str]) -> list[str]:
    if os.path.isfile(name):
        return [name]
    if os.path.isdir(name):
        files = _files_below(name, left_out)
        if not files:
            raise BadInput(f"Input {name} is a folder without files.")
        return files
    if glob.has_magic(name):
        matches = sorted(glob.glob(name, recursive=True))
        files = [path for path in matches if os.path.isfile(path)]
        if not files:
            raise BadInput(f"Input {name} matches no file.")
        return files
    raise BadInput(f"Input {name} is not a file, a folder or a pattern of files.")


def _files_below(folder: str, left_out: list[str]) -> list[str]:
    files = []
    for parent, folders, names in os.walk(folder):
        kept = [name for name in folders if name[0] not in "._" and not Path(parent, name).is_symlink()]
        left_out += [os.path.join(parent, name, "") for name in sorted({*folders} - {*kept})]
        folders[:] = kept
        for name in names:
            path = os.path.join(parent, name)
            if name[0] in "._" or not os.path.isfile(path):
                left_out.append(path)
            else:
                files.append(path)
    return sorted(files)


def _look(path: str, container: str | None) -> Source:
    with open(path, "rb") as file:
        magic = file.read(16)
        file.seek(0)
        packing = next((name for name, each in PACKINGS.items() if magic.startswith(each.magic)), "")
        try:
            with _unpacked(file, packing) as content:
                head = content.read(_HEAD_BYTES)
        except (*UNPACKING_ERRORS, OSError) as error:
            raise _damaged(path, packing, error) from error
    marked = head.startswith(codecs.BOM_UTF8)
    head = head.removeprefix(codecs.BOM_UTF8)
    if packing and any(head.startswith(each.magic) for each in PACKINGS.values()):
        raise BadInput(f"Input {path} is compressed twice: unpack it once.")
    for beginning, what in _UNREADABLE.items():
        if head.startswith(beginning):
            raise BadInput(f"Input {path} is {what}.")
    if head[257:262] == b"ustar":
        raise BadInput(f"Input {path} is a tar archive: unpack it.")
    found = _container_of(head, path)
    if packing and "parquet" in (found, container):
        raise BadInput(f"Input {path} is a parquet file in {packing}: unpack it.")
    if "parquet" not in (found, container) and b"\0" in head:
        raise BadInput(f"Input {path} holds NUL bytes: it is binary, or UTF-16; convert it to UTF-8 text.")
    if container is None and found == "text" and head.strip() and _JSON_NAME.search(os.path.basename(path)):
        raise BadInput(f"Input {path} is called JSON and does not begin like it: set --container.")
    return Source(path, packing, container or found, marked, not head)


def _container_of(head: bytes, path: str) -> str:
    if head.startswith(b"PAR1"):
        return "parquet"
    if _RECORD_ON_A_LINE.match(head):
        return "lines"
    if _RECORD_OVER_LINES.match(head) or _LIST_OF_RECORDS.match(head):
        return "json"
    return "text"


def _unpacked(file: IO[bytes], packing: str) -> IO[bytes]:
    return PACKINGS[packing].unpacked(file) if packing else file


def _damaged(path: str, packing: str, error: Exception) -> Exception:
    """BadInput for damaged content; an answer of the operating system stays what it is."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    what = packing or "parquet"
    return BadInput(f"{path} is cut off or damaged ({what}: {error}): fetch or compress it again.")


def _status(path: Path) -> os.stat_result | None:
    return os.stat(path) if os.path.exists(path) else None
