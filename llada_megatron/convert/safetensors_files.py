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

from llada_megatron.checkpoint.shards import Part, whole
from llada_megatron.config.errors import BadInput
from llada_megatron.config.foreign import distinct_keys
from llada_megatron.convert import block_fp8
from llada_megatron.convert.weight_files import INDEX, SINGLE, weight_files

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By the format's names, in the order in which the library lays tensors out."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
READ = DTYPES | {"F8_E4M3": block_fp8.QUANTIZED}
"""Those that are read; e4m3 becomes one of the others, with its scales."""
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
    """The tensors of `model.safetensors`, or of the shards that the index names, in fp32, bf16 or fp16.

    A matrix in block-quantised fp8 is read as what it stands for, rounded to `dequantised` (bf16 unless it
    is set); its scales are no tensors of the model. Raises BadInput, in one sentence, for a directory that is
    none, pickled weights, a missing or damaged file, an index that says otherwise than the files, and numbers
    that are not served.
    """

    dequantised = torch.bfloat16

    def __init__(self, directory: Path) -> None:
        found = weight_files(directory)
        self.unread = found.unread
        """Names of other files with weights in the directory."""
        self.tensors: dict[str, Stored] = {}
        for path in found.paths:
            for name, stored in _read_header(path).items():
                if name in self.tensors:
                    raise BadInput(f"{name} is in {self.tensors[name].file} and in {path.name}: remove one.")
                self.tensors[name] = stored
        if found.file_of is not None:
            _require_indexed(self.tensors, found.file_of, directory / INDEX)
        self._scales = _take_scales(self.tensors)

    def quantised(self) -> list[str]:
        """Names of the matrices that are stored in fp8."""
        return [name for name, stored in self.tensors.items() if stored.dtype is block_fp8.QUANTIZED]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Of the numbers that `read` gives."""
        return self.dequantised if name in self._scales else self.tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        """All of a tensor."""
        return self.read(whole(name, *self.tensors[name].shape))

    def read(self, part: Part) -> Tensor:
        """The numbers of a part, of shape `part.size`."""
        stored = self.tensors[part.name]
        values = _read(stored, part)
        if part.name not in self._scales:
            return values
        scaled = self._scales[part.name]
        scales = _read(scaled, whole(part.name + block_fp8.SCALE, *scaled.shape)).float()
        if not (scales.isfinite() & (scales >= 0)).all():
            raise BadInput(
                f"{part.name}{block_fp8.SCALE} in {scaled.file} holds a factor that is no finite one:"
                " copy it again."
            )
        return block_fp8.dequantised(values, scales, part.offset[0], self.dequantised)


def as_bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor, as a flat array of bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _read(stored: Stored, part: Part) -> Tensor:
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


def _require_indexed(tensors: dict[str, Stored], file_of: dict[str, str], index: Path) -> None:
    """Raise BadInput where the index and the files that it names differ about a tensor."""
    for name in sorted(tensors.keys() | file_of.keys()):
        held = tensors[name].file.name if name in tensors else None
        if held != file_of.get(name):
            raise BadInput(
                f"{index} places {name} in {file_of.get(name, 'no file')}, and it is in {held or 'none'}:"
                " the index belongs to other files, copy the checkpoint again."
            )


def _take_scales(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Take the scales of fp8 matrices out of the tensors, by the matrix's name; BadInput unless each fits."""
    found = {}
    for name in [name for name in tensors if name.endswith(block_fp8.SCALE)]:
        matrix, scales = name.removesuffix(block_fp8.SCALE), tensors.pop(name)
        if matrix not in tensors or tensors[matrix].dtype is not block_fp8.QUANTIZED:
            held = _type_name(tensors[matrix]) if matrix in tensors else "not there"
            raise BadInput(
                f"{scales.file} holds {name}, and {matrix} is {held}: a tensor with scales must be F8_E4M3."
            )
        found[matrix] = scales
    for name, stored in tensors.items():
        if stored.dtype is not block_fp8.QUANTIZED:
            continue
        if name not in found:
            raise BadInput(
                f"{name} in {stored.file} is of type F8_E4M3 without {name}{block_fp8.SCALE}: only fp8 with"
                f" a scale per block of {block_fp8.BLOCK} x {block_fp8.BLOCK} is served."
            )
        if len(stored.shape) != 2:
            raise BadInput(
                f"{name} in {stored.file} is F8_E4M3 {list(stored.shape)}: only matrices are served."
            )
        shape = block_fp8.scales_shape(stored.shape)
        if shape != found[name].shape or found[name].dtype is block_fp8.QUANTIZED:
            raise BadInput(
                f"{name}{block_fp8.SCALE} in {found[name].file} is {_type_name(found[name])}"
                f" {list(found[name].shape)} for a tensor of {list(stored.shape)}: a matrix with a scale per"
                f" block of {block_fp8.BLOCK} x {block_fp8.BLOCK} would have {list(shape)}."
            )
    return found


def _type_name(stored: Stored) -> str:
    return next(name for name, dtype in READ.items() if dtype is stored.dtype)


def _read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file, which fill it without gaps."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size - len(start)):
            raise BadInput(f"{path} is no safetensors file, or a truncated one: copy it again.")
        try:
            header = json.loads(file.read(length), object_pairs_hook=distinct_keys)
        except (ValueError, RecursionError) as error:  # its text may be as long as the header
            raise BadInput(f"{path} has a damaged header ({str(error)[:80]}): copy it again.") from None
    if not isinstance(header, dict):
        raise BadInput(f"{path} has a damaged header: copy it again.")
    header.pop("__metadata__", None)
    found, spans = {}, []
    for name, entry in header.items():
        found[name], span = _entry(path, name, entry, 8 + length)
        spans.append((*span, name))
    end = 8 + length
    for first, last, name in sorted(spans):
        if first != end:
            raise BadInput(
                f"{path} has a damaged header: {name} starts at byte {first:,}, and what is before it"
                f" ends at {end:,}."
            )
        end = last
    if end != size:
        raise BadInput(f"{path} has {size:,} bytes of {end:,}: it is truncated or damaged, copy it again.")
    return found


def _entry(path: Path, name: str, entry: Any, data: int) -> tuple[Stored, tuple[int, int]]:
    """A tensor of a header, and its first byte and the one after its last in the file."""
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path} has a damaged header at {name}: copy it again.") from None
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
        raise BadInput(f"{path} has a damaged header at {name}: copy it again.")
    if kind := next((kind for end, kind in block_fp8.OTHER_KINDS.items() if name.endswith(end)), None):
        raise BadInput(
            f"{path} holds {name}, a mark of {kind}: of quantised checkpoints only fp8 with a scale per block"
            f" of {block_fp8.BLOCK} x {block_fp8.BLOCK} is served."
        )
    if dtype not in READ:
        raise BadInput(
            f"{name} in {path} is of type {dtype}, and only {', '.join(READ)} are served:"
            " convert a checkpoint of one of these."
        )
    stored = Stored(path, READ[dtype], shape, data + first)
    if last - first != math.prod(shape) * stored.dtype.itemsize:
        raise BadInput(f"{path} has a damaged header: {name} has another size than its shape says.")
    return stored, (data + first, data + last)


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
