"""Reading and writing the weights of our checkpoints a part at a time, without a model.

`shards/` is torch.distributed.checkpoint's format as megatron-core uses it (`torch_dist`): files of tensors
saved one after another, and `.metadata` that says which part of which tensor lies where. megatron-core
writes it from tensors that a model holds; here each part is written when it is there. A part is as small as
the smallest that a rank may want (a matrix of one expert), because a reader reads whole parts.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import IO

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
from llada_megatron.runtime import unpickling

FILE_BYTES = 4_000_000_000
"""A new file is begun after this many bytes."""
COMMON_STATE = ShardedObject("common_state", None, (1,), (0,)).unique_key
"""Where megatron-core keeps what is no tensor; weights have none of it."""
TRAINING_STATE = "optimizer."


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


class ShardsWriter:
    """Writes `shards/` so that megatron-core loads it in any layout."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._results: list[WriteResult] = []
        self._file: IO[bytes] | None = None
        self._files = 0
        common = io.BytesIO()
        torch.save([{}], common)
        self._append(MetadataIndex(COMMON_STATE), common.getvalue())

    def write(self, part: Part, values: Tensor) -> None:
        """Append the numbers of a part."""
        if part.name not in self._tensors:
            properties = TensorProperties(dtype=values.dtype)
            self._tensors[part.name] = TensorStorageMetadata(properties, torch.Size(part.shape), [])
        chunk = ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.size))
        self._tensors[part.name].chunks.append(chunk)
        self._append(MetadataIndex(part.name, chunk.offsets), values)

    def finish(self) -> None:
        """Write the metadata, without which there is no checkpoint."""
        assert self._file is not None
        self._file.close()
        metadata = Metadata({COMMON_STATE: BytesStorageMetadata(), **self._tensors})
        FileSystemWriter(self._directory).finish(metadata, [self._results])
        save_config(CheckpointingConfig("torch_dist"), str(self._directory))

    def _append(self, index: MetadataIndex, content: bytes | Tensor) -> None:
        file = self._current_file()
        start = file.tell()
        if isinstance(content, bytes):
            file.write(content)
        else:
            own = content.untyped_storage().nbytes() == content.nbytes
            torch.save(content if own else content.clone(), file)  # a view would be saved with all it views
        stored = _StorageInfo(Path(file.name).name, start, file.tell() - start)
        self._results.append(WriteResult(index, stored.length, stored))

    def _current_file(self) -> IO[bytes]:
        if self._file is None or self._file.tell() > FILE_BYTES:
            if self._file is not None:
                self._file.close()
            self._file = open(self._directory / f"__0_{self._files}.distcp", "wb")  # noqa: SIM115
            self._files += 1
        return self._file


class ShardsReader:
    """Reads weights that were saved in any layout; BadInput where `shards/` is none, or damaged."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._metadata = unpickling.read_metadata(directory)
        self._tensors = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(TRAINING_STATE)
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by key of the weights; the optimizer's state is left out."""
        return {name: tuple(entry.size) for name, entry in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Type of the numbers of a weight."""
        return self._tensors[name].properties.dtype

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
                values[into] = self._load(part.name, chunk)[of]
        return values

    def _load(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        stored = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        path = self._directory / stored.relative_path
        with path.open("rb") as file:
            file.seek(stored.offset)
            content = io.BytesIO(file.read(stored.length))
        try:
            loaded = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes can raise anything
            raise BadInput(f"{path} cannot be read at {name}: {unpickling.in_words(error)}.") from error
        if not isinstance(loaded, Tensor) or loaded.numel() != math.prod(chunk.sizes):
            raise BadInput(f"{path} holds no part of {name}, of shape {list(chunk.sizes)}.")
        return loaded.reshape(chunk.sizes)
