"""The weighted mean of checkpoints, tensor by tensor, and how far two checkpoints are apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from llada_megatron.checkpoint.shards import Part, ShardsReader, ShardsWriter, whole
from llada_megatron.config.errors import BadInput
from llada_megatron.record.run_dir import SHARDS


def write_mean(sources: list[Path], weights: list[float], shards: Path) -> None:
    """Write the weights' mean, sum_i w_i x_i / sum_i w_i, into the new directory `shards`, all in fp32.

    Expert biases are averaged like every tensor; optimizer state is left out. At most one part of a tensor of
    each source is in memory. Raises BadInput when the sources are not of one architecture.
    """
    readers = [ShardsReader(source / SHARDS) for source in sources]
    shapes = readers[0].shapes()
    for source, reader in zip(sources, readers, strict=True):
        if reader.shapes() != shapes:
            raise BadInput(f"{source} holds other tensors than {sources[0]}: they are of two architectures.")
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    writer = ShardsWriter(shards)
    for part in parts_in(shapes):
        mean = torch.zeros(part.size, dtype=torch.float64)
        for fraction, reader in zip(share, readers, strict=True):
            mean += fraction * reader.read(part).double()
        writer.write(part, mean.float())
    writer.finish()


@dataclass
class TensorDifference:
    """How far a tensor is from that of another checkpoint: || b - a || / || a ||; infinite from zero."""

    name: str
    relative_l2: float
    largest: float


def differences(a: Path, b: Path) -> tuple[list[TensorDifference], list[str]]:
    """Tensors of two checkpoints that differ, the farthest first, and what only one of them has, in words."""
    readers = [ShardsReader(path / SHARDS) for path in (a, b)]
    shapes_a, shapes_b = (reader.shapes() for reader in readers)
    alone = [f"{name} is in {a} alone" for name in sorted(shapes_a.keys() - shapes_b.keys())]
    alone += [f"{name} is in {b} alone" for name in sorted(shapes_b.keys() - shapes_a.keys())]
    common = sorted(shapes_a.keys() & shapes_b.keys())
    alone += [
        f"{name} is {list(shapes_a[name])} in {a} and {list(shapes_b[name])} in {b}"
        for name in common
        if shapes_a[name] != shapes_b[name]
    ]
    sums: dict[str, list[float]] = {}
    for part in parts_in({name: shapes_a[name] for name in common if shapes_a[name] == shapes_b[name]}):
        before, after = (reader.read(part).double() for reader in readers)
        total = sums.setdefault(part.name, [0.0, 0.0, 0.0])
        total[0] += float((after - before).square().sum())
        total[1] += float(before.square().sum())
        total[2] = max(total[2], float((after - before).abs().max()))
    found = [
        TensorDifference(name, math.sqrt(moved / size) if size else math.inf, largest)
        for name, (moved, size, largest) in sums.items()
        if moved
    ]
    return sorted(found, key=lambda each: -each.relative_l2), alone


def parts_in(shapes: dict[str, tuple[int, ...]]) -> Iterator[Part]:
    """Every tensor in the parts in which it is written: a matrix at a time of stacked experts."""
    for name, shape in sorted(shapes.items()):
        if len(shape) < 3:
            yield whole(name, *shape)
            continue
        for expert in range(shape[0]):
            yield Part(name, shape, (expert, *(0,) * (len(shape) - 1)), (1, *shape[1:]))
