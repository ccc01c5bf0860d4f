"""Reading and writing the tensors of our checkpoints a part at a time, without a model.

`shards/` and `optimizer/` are torch.distributed.checkpoint's format as megatron-core uses it (`torch_dist`):
files of tensors saved one after another, and `.metadata` that says which part of which tensor lies where.
Every file is hashed while it is written. A reader reads whole parts, so a part should be no larger than what
a rank may want.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from llada_megatron.config.errors import BadInput
from llada_megatron.record.run_dir import OPTIMIZER, SHARDS
from llada_megatron.runtime import unpickling

FILE_BYTES = 4_000_000_000
"""A streaming writer begins a new file after this many bytes."""
OWN_FILE_BYTES = 1 << 24
"""A rank's tensors are written into one file more for each so many bytes, as far as there are threads."""
COMMON_STATE = ShardedObject("common_state", None, (1,), (0,)).unique_key
"""Where megatron-core keeps what is no tensor; weights have none of it."""
TRAINING_STATE = "optimizer."
"""Names of the optimizer's tensors begin so; earlier checkpoints hold them among the weights."""


@dataclass(frozen=True)
class Part:
    """A contiguous run of a named tensor: `size` elements of each axis from `offset` on."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def start(self) -> int:
        """Index of its first element in the flattened tensor."""
        return sum(at * math.prod(self.shape[axis + 1 :]) for axis, at in enumerate(self.offset))

    @property
    def elements(self) -> int:
        return math.prod(self.size)


def whole(name: str, *shape: int) -> Part:
    """All of a tensor."""
    return Part(name, shape, (0,) * len(shape), shape)


@dataclass(frozen=True)
class Stored:
    """Where a part lies; `dtype` is None for what is no tensor."""

    part: Part
    dtype: torch.dtype | None
    file: str
    offset: int
    length: int


class HashedFile:
    """A new file of parts, hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.bytes = 0
        self.stored: list[Stored] = []
        self._file = open(path, "wb")  # noqa: SIM115  # closed by `close`
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """What torch.save calls."""
        self._digest.update(data)
        self._file.write(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def append(self, part: Part, values: Tensor) -> None:
        """Add the numbers of a part, which lie in host memory."""
        start = self.bytes
        torch.save(_alone(values), self)
        self.stored.append(Stored(part, values.dtype, self.name, start, self.bytes - start))

    def append_common(self, state: dict[str, Any]) -> None:
        """Add what is no tensor: plain values."""
        start = self.bytes
        torch.save([state], self)
        self.stored.append(Stored(whole(COMMON_STATE), None, self.name, start, self.bytes - start))

    def close(self) -> dict[str, Any]:
        """Bring everything to the disk; its record in a manifest."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self.bytes, "sha256": self._digest.hexdigest()}


def _alone(values: Tensor) -> Tensor:
    """The same memory as a tensor of its own: a view would be saved with all it views."""
    values = values.detach()
    if values.untyped_storage().nbytes() == values.nbytes or not values.numel():
        return values
    flat = values.contiguous().reshape(-1).view(torch.uint8).numpy()
    return torch.frombuffer(flat, dtype=values.dtype).view(values.shape)


@dataclass
class Written:
    """What one rank wrote into a directory of a checkpoint."""

    stored: list[Stored]
    records: dict[str, dict[str, Any]]
    """Size and SHA-256 by the names of the files."""


def write_parts(
    directory: Path,
    prefix: str,
    parts: list[tuple[Part, Tensor]],
    common: dict[str, Any] | None,
    *,
    threads: int,
) -> Written:
    """Write parts, and `common` where it is given, into at most `threads` new files at the same time.

    Tensors lie in host memory. Raises OSError where the disk refuses.
    """
    wanted = sum(values.nbytes for _, values in parts) // OWN_FILE_BYTES + 1
    dealt = [share for share in _dealt(parts, min(threads, wanted)) if share]
    if common is not None and not dealt:
        dealt = [[]]

    def write(index: int) -> HashedFile:
        file = HashedFile(directory / f"{prefix}{index}.distcp")
        if index == 0 and common is not None:
            file.append_common(common)
        for part, values in dealt[index]:
            file.append(part, values)
        return file

    if not dealt:
        return Written([], {})
    with ThreadPoolExecutor(len(dealt)) as pool:
        files = list(pool.map(write, range(len(dealt))))
        records = list(pool.map(HashedFile.close, files))
    return Written(
        [each for file in files for each in file.stored],
        {file.name: record for file, record in zip(files, records, strict=True)},
    )


def _dealt(parts: list[tuple[Part, Tensor]], shares: int) -> list[list[tuple[Part, Tensor]]]:
    """The parts in shares of about the same bytes, each in the order given."""
    dealt: list[list[int]] = [[] for _ in range(shares)]
    filled = [0] * shares
    for index in sorted(range(len(parts)), key=lambda each: -parts[each][1].nbytes):
        least = filled.index(min(filled))
        dealt[least].append(index)
        filled[least] += parts[index][1].nbytes
    return [[parts[index] for index in sorted(share)] for share in dealt]


def write_index(directory: Path, stored: Iterable[Stored]) -> None:
    """Write what says where everything lies, without which there is no checkpoint."""
    entries: dict[str, Any] = {}
    results = []
    for each in stored:
        part = each.part
        if each.dtype is None:
            entries[part.name], index = BytesStorageMetadata(), MetadataIndex(part.name)
        else:
            if part.name not in entries:
                properties = TensorProperties(dtype=each.dtype)
                entries[part.name] = TensorStorageMetadata(properties, torch.Size(part.shape), [])
            chunk = ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.size))
            entries[part.name].chunks.append(chunk)
            index = MetadataIndex(part.name, chunk.offsets)
        results.append(WriteResult(index, each.length, _StorageInfo(each.file, each.offset, each.length)))
    FileSystemWriter(directory).finish(Metadata(entries), [results])
    save_config(CheckpointingConfig("torch_dist"), str(directory))


def require_whole(stored: Iterable[Stored]) -> None:
    """Raise ValueError where the parts of a tensor are not each of its elements once."""
    left: dict[str, int] = {}
    places: set[tuple[str, tuple[int, ...]]] = set()
    for each in stored:
        part = each.part
        if (part.name, part.offset) in places:
            raise ValueError(f"A part of {part.name} was written twice.")
        places.add((part.name, part.offset))
        left[part.name] = left.get(part.name, math.prod(part.shape)) - part.elements
    if wrong := [name for name, count in left.items() if count]:
        raise ValueError(f"Parts of {wrong[0]} are missing, or overlap.")


class ShardsWriter:
    """Writes `shards/`, part by part as they come, so that megatron-core loads it in any layout."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._files = [HashedFile(directory / "__0_0.distcp")]
        self._files[0].append_common({})

    def write(self, part: Part, values: Tensor) -> None:
        """Append the numbers of a part."""
        if self._files[-1].bytes > FILE_BYTES:
            self._files[-1].close()
            self._files.append(HashedFile(self._directory / f"__0_{len(self._files)}.distcp"))
        self._files[-1].append(part, values)

    def finish(self) -> None:
        """Write the metadata, without which there is no checkpoint."""
        self._files[-1].close()
        write_index(self._directory, [each for file in self._files for each in file.stored])


def tensors_of(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint by its name, weights and training state, one at a time."""
    own = checkpoint / OPTIMIZER
    readers = [
        ShardsReader(checkpoint / SHARDS),
        ShardsReader(own if own.is_dir() else checkpoint / SHARDS, training_state=True),
    ]
    for reader in readers:
        for name, shape in sorted(reader.shapes().items()):
            yield name, reader.read(whole(name, *shape))


class ShardsReader:
    """Reads tensors that were saved in any layout; BadInput where the directory holds none, or is damaged."""

    def __init__(self, directory: Path, *, training_state: bool = False) -> None:
        """training_state: the optimizer's tensors instead of the weights."""
        self._directory = directory
        self._metadata = unpickling.read_metadata(directory)
        self._tensors = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and name.startswith(TRAINING_STATE) == training_state
        }
        self._latest: tuple[MetadataIndex, Tensor] | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by key."""
        return {name: tuple(entry.size) for name, entry in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Type of the numbers of a tensor."""
        return self._tensors[name].properties.dtype

    def common(self) -> Any:
        """What was saved that is no tensor."""
        return self._load(MetadataIndex(COMMON_STATE), lambda found: isinstance(found, list))[0]

    def read(self, part: Part) -> Tensor:
        """The numbers of a part, of shape `part.size`; NaN where no file holds any."""
        values = torch.full(part.size, math.nan, dtype=self.dtype(part.name))
        for chunk in self._tensors[part.name].chunks:
            spans = [
                (max(at, first), min(at + size, first + count))
                for at, size, first, count in zip(
                    part.offset, part.size, chunk.offsets, chunk.sizes, strict=True
                )
            ]
            if all(start < stop for start, stop in spans):
                into = tuple(slice(a - at, b - at) for (a, b), at in zip(spans, part.offset, strict=True))
                of = tuple(slice(a - at, b - at) for (a, b), at in zip(spans, chunk.offsets, strict=True))
                values[into] = self._chunk(part.name, chunk)[of]
        return values

    def _chunk(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        """A part as it lies in a file; the latest one is kept, as the next one read is often of it too."""
        index = MetadataIndex(name, chunk.offsets)
        if self._latest is None or self._latest[0] != index:
            elements = math.prod(chunk.sizes)
            loaded = self._load(index, lambda found: isinstance(found, Tensor) and found.numel() == elements)
            self._latest = index, loaded.reshape(chunk.sizes)
        return self._latest[1]

    def _load(self, index: MetadataIndex, fits: Callable[[Any], bool]) -> Any:
        stored = self._metadata.storage_data[index]
        path = self._directory / stored.relative_path
        with path.open("rb") as file:
            file.seek(stored.offset)
            content = io.BytesIO(file.read(stored.length))
        try:
            loaded = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes can raise anything
            raise BadInput(f"{path} cannot be read at {index.fqn}: {unpickling.in_words(error)}.") from error
        if not fits(loaded):
            raise BadInput(f"{path} holds no part of {index.fqn} that fits.")
        return loaded
