"""The header of a GGUF file, and where its tensors lie (github.com/ggml-org/ggml, docs/gguf.md).

The package gguf believes whatever counts and lengths a file states, which for a damaged one takes hours or
all memory; here nothing is read that the file is too short for.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llada_megatron.config.errors import BadInput

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Formats of struct, by the number of a type."""
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
SHORTEST_STRING = 8
"""Bytes of its length alone."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor: its shape as we write it, rows first, the kind of its numbers, and its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    """gguf.GGMLQuantizationType."""
    data: np.ndarray
    """uint8, one dimension."""


class GgufFile:
    """Metadata by key and tensors by name; BadInput, in one sentence, for a file that is none or damaged."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        if path.stat().st_size < 24:
            raise self._damage("it is too short")
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._take(4) != b"GGUF":
            raise self._damage("it does not begin with GGUF")
        (version,) = self._unpack("I")
        if version not in VERSIONS:
            raise self._damage(f"its version is {version}, and {VERSIONS[0]} and {VERSIONS[1]} are served")
        tensors, keys = self._unpack("QQ")
        self.fields: dict[str, Any] = {}
        for _ in range(keys):  # each takes bytes of the file, which end
            key = self._string()
            if key in self.fields:
                raise self._damage(f"{key!r:.80} comes twice")
            self.fields[key] = self._value(key)
        described = [self._tensor_info() for _ in range(tensors)]
        self.tensors = {tensor.name: tensor for tensor in self._tensors(described)} if described else {}

    def _damage(self, reason: str) -> BadInput:
        return BadInput(f"{self._path} is no GGUF file, or a damaged one: {reason}; copy it again.")

    def _take(self, count: int) -> bytes:
        if count > len(self._bytes) - self._at:
            raise self._damage(f"it ends at byte {len(self._bytes):,} inside what byte {self._at:,} begins")
        self._at += count
        return self._bytes[self._at - count : self._at]

    def _unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))

    def _string(self) -> str:
        try:
            return self._take(*self._unpack("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self._damage(f"the text before byte {self._at:,} is not UTF-8") from None

    def _value(self, key: str) -> Any:
        (kind,) = self._unpack("I")
        if kind in SCALARS:
            return self._unpack(SCALARS[kind])[0]
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise self._damage(f"{key!r:.80} is of type {kind}, which is none")
        kind, count = self._unpack("IQ")
        if kind == STRING:
            if count * SHORTEST_STRING > len(self._bytes) - self._at:
                raise self._damage(f"{key!r:.80} states {count:,} texts, for which it is too short")
            return [self._string() for _ in range(count)]
        if kind not in SCALARS:
            raise self._damage(f"{key!r:.80} is an array of type {kind}, which is not served")
        size = struct.calcsize(f"<{SCALARS[kind]}")
        return list(struct.unpack(f"<{count}{SCALARS[kind]}", self._take(count * size))) if count else []

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (dimensions,) = self._unpack("I")
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise self._damage(f"{name!r:.80} has {dimensions} dimensions")
        sizes = self._unpack("Q" * dimensions)
        kind, offset = self._unpack("IQ")
        return name, tuple(reversed(sizes)), kind, offset

    def _tensors(self, described: list[tuple[str, tuple[int, ...], int, int]]) -> list[GgufTensor]:
        """Tensors that follow each other without gaps, as ggml demands."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        alignment = self.fields.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._damage(f"general.alignment is {alignment!r}")
        start, expected, names, found = -(-self._at // alignment) * alignment, 0, set[str](), []
        for name, shape, kind, offset in described:
            if kind not in {each.value for each in GGMLQuantizationType}:
                raise self._damage(f"{name!r:.80} is of type {kind}, which is not known")
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if name in names or offset != expected or shape[-1] % block or not math.prod(shape):
                raise self._damage(
                    f"{name!r:.80} of shape {list(shape)} at {offset:,} does not fit what is before it"
                )
            size = math.prod(shape) // block * block_bytes
            if start + offset + size > len(self._bytes):
                raise self._damage(f"it ends inside {name!r:.80}")
            names.add(name)
            expected = -(-(offset + size) // alignment) * alignment
            data = np.frombuffer(self._bytes, np.uint8, size, start + offset)
            found.append(GgufTensor(name, shape, GGMLQuantizationType(kind), data))
        return found
