"""Reading and writing safetensors checkpoints a part at a time.

The library maps or holds whole files, and a file may be larger than what a part of a model should cost; the
format is a length, a JSON header and plain numbers (github.com/huggingface/safetensors, README). Files
written here equal the library's byte for byte.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llada_megatron.checkpoint.shards import Part
from llada_megatron.config.errors import BadInput
from llada_megatron.record.json_files import read_json, require

REMEDY = "give the directory of a Hugging Face checkpoint"

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By the format's names, in the order in which the library lays tensors out."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_HEADER_BYTES = 100_000_000
"""The library's own bound."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int
    """Byte in the file."""


class SafetensorsReader:
    """The tensors of `model.safetensors`, or of the shards that the index names.

    Raises BadInput, in one sentence, for a directory that is none, pickled weights, a missing or
    truncated file, and numbers of a kind that is not served.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise BadInput(f"{directory} is no directory: give that of a Hugging Face checkpoint.")
        self.tensors: dict[str, Stored] = {}
        for path in _files(directory):
            for name, stored in _read_header(path).items():
                if name in self.tensors:
                    raise BadInput(f"{name} is in {self.tensors[name].file.name} and in {path.name}.")
                self.tensors[name] = stored

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    def read(self, part: Part) -> Tensor:
        """The numbers of a part, of shape `part.size`."""
        stored = self.tensors[part.name]
        values = torch.empty(part.size, dtype=stored.dtype)
        with open(stored.file, "rb", buffering=0) as file:
            file.seek(stored.at + part.start * values.element_size())
            view = memoryview(as_bytes(values))
            while view:  # one call reads at most 2 GiB
                count = file.readinto(view)
                if not count:
                    raise BadInput(f"{stored.file} ends inside {part.name}: copy it again.")
                view = view[count:]
        return values


def as_bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor, as a flat array of bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _files(directory: Path) -> list[Path]:
    names = [SINGLE]
    if (directory / INDEX).is_file():
        index = read_json(directory / INDEX, REMEDY)
        require(index, directory / INDEX, "weight_map", remedy=REMEDY)
        names = sorted(set(index["weight_map"].values()))
    elif not (directory / SINGLE).is_file():
        pickled = sorted(path.name for pattern in PICKLED for path in directory.glob(pattern))
        if pickled:
            raise BadInput(
                f"{directory} holds pickled weights ({pickled[0]}), which can run any code and are not read:"
                " save them as safetensors."
            )
    for name in names:
        if not (directory / name).is_file():
            raise BadInput(f"{directory} holds no {name}: give the directory of a complete checkpoint.")
    return [directory / name for name in names]


def _read_header(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size):
            raise BadInput(f"{path} is no safetensors file, or a truncated one: copy it again.")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise BadInput(f"{path} has a damaged header: copy it again.") from None
    header.pop("__metadata__", None)
    found, end = {}, 8 + length
    for name, entry in header.items():
        try:
            dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise BadInput(f"{path} has a damaged header at {name}: copy it again.") from None
        if dtype not in DTYPES:
            raise BadInput(
                f"{name} in {path} is of type {dtype}, and only {', '.join(DTYPES)} are served:"
                " convert a checkpoint of one of these."
            )
        stored = Stored(path, DTYPES[dtype], shape, 8 + length + first)
        if last - first != math.prod(stored.shape) * stored.dtype.itemsize:
            raise BadInput(f"{path} has a damaged header: {name} has another size than its shape says.")
        found[name] = stored
        end = max(end, 8 + length + last)
    if end != size:
        raise BadInput(f"{path} has {size:,} bytes of {end:,}: it is truncated or damaged, copy it again.")
    return found


class SafetensorsWriter:
    """Files of at most `max_bytes` each, with an index when there are several; parts come in any order."""

    def __init__(
        self, directory: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], max_bytes: int
    ) -> None:
        self._directory = directory
        shards = _split(tensors, max_bytes)
        self._stored: dict[str, Stored] = {}
        for number, names in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._stored |= _write_header(directory / name, {name: tensors[name] for name in names})

    def write(self, part: Part, values: Tensor) -> None:
        """Put the numbers of a part into their file."""
        stored = self._stored[part.name]
        with open(stored.file, "r+b", buffering=0) as file:
            file.seek(stored.at + part.start * values.element_size())
            view = memoryview(as_bytes(values.contiguous()))
            while view:
                view = view[file.write(view) :]

    def finish(self) -> None:
        """Write the index, where there is more than one file."""
        files = {name: stored.file.name for name, stored in self._stored.items()}
        if len(set(files.values())) == 1:
            return
        total = sum(math.prod(s.shape) * s.dtype.itemsize for s in self._stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        write_json(self._directory / INDEX, index, sort_keys=True)


def write_json(path: Path, content: dict[str, Any], *, sort_keys: bool = False) -> None:
    """As transformers writes them."""
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=sort_keys)
    path.write_text(text + "\n", encoding="utf-8")


def _split(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], max_bytes: int) -> list[list[str]]:
    """Names in their order, as many per shard as fit; a larger tensor gets one of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_header(path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Stored]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order, at = list(DTYPES.values()), 0
    laid_out: Iterable[str] = sorted(tensors, key=lambda name: (order.index(tensors[name][0]), name))
    for name in laid_out:
        dtype, shape = tensors[name]
        size = math.prod(shape) * dtype.itemsize
        entry = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        header[name] = entry
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        os.truncate(file.fileno(), 8 + len(text) + at)
    return {
        name: Stored(path, *tensors[name], 8 + len(text) + header[name]["data_offsets"][0])
        for name in tensors
    }
