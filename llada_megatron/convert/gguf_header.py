"""Whether the counts in a GGUF file fit into it: the library's reader believes them, and may never end."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import IO

from llada_megatron.config.errors import BadInput

MAGIC = b"GGUF"
FIXED_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""By the format's number of a type."""
TEXT, ARRAY = 8, 9


def require_whole(path: Path) -> None:
    """Walk over the metadata and the descriptions of tensors of a GGUF file, version 2 or 3.

    Raises BadInput naming the file where a count or a length leads past its end, or a kind is unknown.
    """
    fault = f"{path} is no GGUF file, or a damaged one"
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise BadInput(f"{fault}: it begins otherwise.")
        walk = _Walk(file, os.path.getsize(path))
        try:
            walk.over()
        except EOFError:
            raise BadInput(f"{fault}: it ends inside its header, before byte {file.tell():,}.") from None
        except ValueError as error:
            raise BadInput(f"{fault}: {error}.") from None


class _Walk:
    """A file behind its magic number. EOFError past its end, ValueError for what is unknown."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size, self.order = file, size, "<"

    def over(self) -> None:
        version = self.number("I")
        if version and version % 2**16 == 0:
            self.order, version = ">", version >> 24
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, and 2 and 3 are served")
        tensors, pairs = self.number("Q"), self.number("Q")
        for _ in range(pairs):
            self.text()
            self.value(self.number("I"))
        for _ in range(tensors):
            self.text()
            axes = self.number("I")
            self.skip(axes, 8)
            self.skip(1, 4 + 8)  # type and offset

    def value(self, kind: int) -> None:
        if kind == TEXT:
            self.text()
        elif kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner == TEXT:
                for _ in range(count):
                    self.text()
            else:
                self.skip(count, self.bytes_of(inner))
        else:
            self.skip(1, self.bytes_of(kind))

    def bytes_of(self, kind: int) -> int:
        if kind not in FIXED_BYTES:
            raise ValueError(f"a value in it is of type {kind}")
        return FIXED_BYTES[kind]

    def text(self) -> None:
        self.skip(self.number("Q"), 1)

    def skip(self, count: int, each: int) -> None:
        if count * each > self.size - self.file.tell():
            raise EOFError
        self.file.seek(count * each, os.SEEK_CUR)

    def number(self, code: str) -> int:
        content = self.file.read(struct.calcsize(f"{self.order}{code}"))
        if len(content) < struct.calcsize(f"{self.order}{code}"):
            raise EOFError
        return int(struct.unpack(f"{self.order}{code}", content)[0])
