"""Checkpoints with adapters, read as the weights that they add up to: W' = W + (alpha / rank) B A."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llada_megatron.checkpoint.shards import Part, ShardsReader
from llada_megatron.config.schema import LoraConfig, ModelConfig
from llada_megatron.model.adapters import A, B, is_adapter

WEIGHT = ".weight"


def without_adapters(model: ModelConfig) -> ModelConfig:
    """The model that its weights make when the adapters are merged."""
    return replace(model, lora=LoraConfig())


class MergedReader:
    """As ShardsReader, of the weights with their adapters added, rounded to `dtype` or as they are stored."""

    def __init__(self, shards: ShardsReader, lora: LoraConfig, dtype: torch.dtype | None = None) -> None:
        self.lora = lora
        self._shards, self._asked, self._shapes = shards, dtype, shards.shapes()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by key, of the weights alone."""
        return {name: shape for name, shape in self._shapes.items() if not is_adapter(name)}

    def dtype(self, name: str) -> torch.dtype:
        """Type of the numbers of a weight."""
        stored = self._shards.dtype(name)
        return self._asked or stored if self.has_adapter(name) else stored

    def has_adapter(self, name: str) -> bool:
        """Whether an adapter stands beside this weight."""
        return f"{name.removesuffix(WEIGHT)}.{A}" in self._shapes

    def rounds(self) -> bool:
        """Whether a sum is written in fewer digits than it is added up in."""
        return any(self.dtype(name) != torch.float32 for name in self.shapes() if self.has_adapter(name))

    def read(self, part: Part) -> Tensor:
        """The numbers of a part; of an adapted matrix added up in fp32."""
        values = self._shards.read(part)
        if not self.has_adapter(part.name):
            return values
        return (values.float() + self.added(part)).to(self.dtype(part.name))

    def added(self, part: Part) -> Tensor:
        """What the adapter adds to whole rows of a matrix, fp32."""
        a, b = self.factors(part)
        return self.lora.alpha / self.lora.rank * (b.float() @ a.float())

    def factors(self, part: Part) -> tuple[Tensor, Tensor]:
        """A [..., rank, in] and these rows of B [..., rows, rank]; of an expert's matrix with a leading 1."""
        stem = part.name.removesuffix(WEIGHT)
        a, b = f"{stem}.{A}", f"{stem}.{B}"
        experts, rank = part.offset[:-2], self.lora.rank
        width, rows = part.shape[-1], part.size[-2]
        of_a = Part(a, self._shapes[a], (*experts, 0, 0), (*part.size[:-2], rank, width))
        of_b = Part(b, self._shapes[b], (*experts, part.offset[-2], 0), (*part.size[:-2], rows, rank))
        return self._shards.read(of_a), self._shards.read(of_b)
