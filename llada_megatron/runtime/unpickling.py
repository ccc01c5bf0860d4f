"""What torch unpickles of a checkpoint: `.metadata` by the classes named here, the rest as weights.

A pickle can call anything, and a checkpoint may come from anywhere. torch reads the index of the shards,
`.metadata`, with plain pickle, and objects in the shards with weights_only=False; after `install` neither is
so, whoever asks: megatron-core's load, `common.pt` of older formats and our own readers.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from llada_megatron.config.errors import BadInput
from llada_megatron.runtime.mcore_cpu import expect

METADATA = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint"
ADMITTED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(
        (f"{_CHECKPOINT}.metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        (f"{_CHECKPOINT}.planner", name)
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # what Python 3.13 calls it
}  # fmt: skip
"""What a `.metadata` may name, beside torch's dtypes: records without behaviour."""


def install() -> None:
    """Make every torch.load one of weights, and every reading of `.metadata` that of `read_metadata`.

    Calling it again changes nothing. Raises RuntimeError where torch no longer looks as expected.
    """
    expect("torch.distributed.checkpoint.filesystem", "metadata = pickle.load(metadata_file)")
    expect("torch.serialization", "elif force_weights_only_load:\n        weights_only = True")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # torch refuses the two together

    def of_reader(self: FileSystemReader) -> Metadata:  # without `rank`: torch then looks for no other file
        metadata = _held.get(Path(self.path)) or read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    FileSystemReader.read_metadata = of_reader  # type: ignore[method-assign]


_held: dict[Path, Metadata] = {}


@contextmanager
def read_once(shards: Path) -> Iterator[None]:
    """Inside, torch gets the index of `shards` as `read_metadata` read it here, with its errors, once."""
    _held[shards] = read_metadata(shards)
    try:
        yield
    finally:
        del _held[shards]


def read_metadata(shards: Path) -> Metadata:
    """The index of the tensors in `shards`, every entry of which lies in the files that are there.

    Raises BadInput for a `.metadata` that is missing or damaged, describes other files than those beside it,
    or asks for anything but its few classes, which is then not called; OSError where it cannot be read.
    """
    path = shards / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{shards} holds no weights (no {METADATA}): give a checkpoint's directory.") from None
    except (OSError, BadInput):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"{path} is damaged ({reason[:100]}): take another checkpoint.") from None
    for fault in _faults(metadata, shards):
        raise BadInput(f"{path} is damaged: {' '.join(fault.split())}; take another checkpoint.")
    return metadata


def in_words(error: BaseException) -> str:
    """Why torch could not read an object, in one line and without its advice to read it unsafely."""
    asked = re.search(r"GLOBAL ([\w.]+)|(?:class|function) ([\w.]+\.[\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and asked:
        return f"it asks for {asked[1] or asked[2]}, which could run code: it was not read"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        lines[-1] if lines and not isinstance(error, pickle.UnpicklingError) else "it holds no plain values"
    )


class _Unpickler(pickle._Unpickler):  # type: ignore[misc]
    """Finds only what is admitted, and fills objects alone, never classes or functions.

    Python's own implementation, as the one in C takes memory for the largest memo number that a file names.
    """

    stack: list[Any]

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._path = file.name

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if (module, name) in ADMITTED or isinstance(found, torch.dtype):
            return super().find_class(module, name)
        raise BadInput(
            f"{self._path} asks for {module}.{name}, which could run code and no checkpoint of ours holds:"
            " it was not read."
        )

    def _fill(self) -> None:
        filled = self.stack[-2]
        if (type(filled).__module__, type(filled).__qualname__) not in ADMITTED:
            raise pickle.UnpicklingError(f"it fills a {type(filled).__name__}")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)  # type: ignore[arg-type]

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: _fill,
    }


def _faults(metadata: Any, shards: Path) -> Iterator[str]:
    """What is wrong with an index: the types of its entries, bytes that no file holds, tensors with holes."""
    entries, storage = (getattr(metadata, name, None) for name in ("state_dict_metadata", "storage_data"))
    if type(metadata) is not Metadata or not isinstance(entries, dict) or not isinstance(storage, dict):
        yield "it holds no index of tensors"
        return
    if not isinstance(getattr(metadata, "storage_meta", None), StorageMeta | None):
        yield "it does not say how it was stored"
    sizes = {path.name: path.stat().st_size for path in shards.iterdir() if path.is_file()}
    for index, stored in storage.items():
        if fault := _storage_fault(index, stored, sizes):
            yield fault
    for name, entry in entries.items():
        if not isinstance(name, str):
            yield "a name in it is no text"
        elif isinstance(entry, BytesStorageMetadata):
            if MetadataIndex(name) not in storage:
                yield f"it does not say where {name} lies"
        elif fault := _tensor_fault(name, entry, storage):
            yield fault


def _storage_fault(index: Any, stored: Any, sizes: dict[str, int]) -> str | None:
    if not isinstance(index, MetadataIndex) or not isinstance(stored, _StorageInfo):
        return "an entry of its storage is none"
    place = [getattr(stored, name, None) for name in ("offset", "length")]
    file, transforms = (getattr(stored, name, None) for name in ("relative_path", "transform_descriptors"))
    if not isinstance(file, str) or file not in sizes or transforms:
        return f"there is no file {file!r} beside it that can be read"
    if not _are_sizes(place) or sum(place) > sizes[file]:  # type: ignore[arg-type]
        return f"{file} has {sizes[file]:,} bytes, and it looks for more"
    return None


def _tensor_fault(name: str, entry: Any, storage: dict[MetadataIndex, _StorageInfo]) -> str | None:
    size, chunks, properties = (getattr(entry, key, None) for key in ("size", "chunks", "properties"))
    dtype = getattr(properties, "dtype", None)
    if (
        not isinstance(entry, TensorStorageMetadata)
        or not isinstance(properties, TensorProperties)
        or not isinstance(dtype, torch.dtype)
        or not isinstance(size, tuple)
        or not _are_sizes(size)
        or not isinstance(chunks, list)
    ):
        return f"{name} has no type, shape and parts"
    held = 0
    for chunk in chunks:
        offsets, sizes = (getattr(chunk, key, None) for key in ("offsets", "sizes"))
        if (
            not isinstance(chunk, ChunkStorageMetadata)
            or not isinstance(offsets, tuple)
            or not isinstance(sizes, tuple)
            or not len(offsets) == len(sizes) == len(size)
            or not _are_sizes((*offsets, *sizes))
            or any(first + count > whole for first, count, whole in zip(offsets, sizes, size, strict=True))
        ):
            return f"a part of {name} does not lie within its shape {list(size)}"
        stored = storage.get(MetadataIndex(name, offsets))
        if stored is None or math.prod(sizes) * dtype.itemsize > stored.length:
            return f"no file holds a part of {name}, of shape {list(sizes)}"
        held += math.prod(sizes)
    return f"parts of {name} are missing" if held < math.prod(size) else None


def _are_sizes(numbers: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)
