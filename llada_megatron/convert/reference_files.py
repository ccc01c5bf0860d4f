"""A Hugging Face folder as the certificate's reference reads it, sharing no code with a conversion's reading.

Files are read with the safetensors library and fp8 is dequantised in another way, so that an error of
`safetensors_files` or `block_fp8` is not made on both sides. Tensors are read whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llada_megatron.checkpoint.shards import Part


@dataclass(frozen=True)
class Held:
    """A tensor of the folder."""

    file: Path
    shape: tuple[int, ...]


class ReferenceFiles:
    """Every tensor of a folder, by name; `dequantised` is the type that fp8 matrices are rounded to."""

    def __init__(self, directory: Path, dequantised: torch.dtype = torch.bfloat16) -> None:
        self._dequantised = dequantised
        index = directory / "model.safetensors.index.json"
        names = {"model.safetensors"}
        if index.is_file():
            names = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        self.tensors: dict[str, Held] = {}
        for path in sorted(directory / name for name in names):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    self.tensors[name] = Held(path, tuple(file.get_slice(name).get_shape()))

    def read(self, part: Part) -> Tensor:
        """The numbers of a part, of shape `part.size`."""
        values = self._whole(part.name)
        if part.name + "_scale_inv" in self.tensors:
            rows, columns = values.shape
            each = self._whole(part.name + "_scale_inv").float()
            factors = torch.kron(each, torch.ones(128, 128))[:rows, :columns]
            values = (values.float() * factors).to(self._dequantised)
        return values[tuple(slice(at, at + size) for at, size in zip(part.offset, part.size, strict=True))]

    def _whole(self, name: str) -> Tensor:
        with safe_open(self.tensors[name].file, "pt") as file:
            return file.get_tensor(name)
