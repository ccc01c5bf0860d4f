"""The optimizer's state as parts of named tensors: saved without a gather, loaded in any layout.

megatron-core's distributed optimizer gives each data-parallel rank one run of each bucket, so of a parameter
it holds elements [first, last) of the flattened matrix. A run of a flattened box is a few boxes (the rest of
a row, whole rows, the beginning of a row), and torch's format takes boxes of any size. So every rank names
its own state by the parameter's name and place in the model, as megatron-core's `fully_reshardable` does
after gathering the whole state on every rank; `dp_reshardable` needs no gather either, but names buckets,
which another layout of tp, pp or ep does not have. (`fully_sharded_model_space`, which described runs as
`flattened_range`, is refused by ShardedTensor since megatron-core 0.14.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from llada_megatron.checkpoint.shards import TRAINING_STATE, Part, ShardsReader

PREFIX = f"{TRAINING_STATE}state"
MASTER = "param"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Misfit(Exception):
    """A tensor of the optimizer that a checkpoint does not hold, or in another shape."""


@dataclass(frozen=True)
class Held:
    """A part of the optimizer's state on this rank."""

    part: Part
    values: Tensor
    """Memory of the optimizer, of shape `part.size`: fp32, of moments precision.moments."""
    is_saved: bool
    """Whether this rank saves it; other ranks that hold the same parameter have it as well."""


def held_here(sharded_model: dict[str, Any], optimizer: MegatronOptimizer) -> Iterator[Held]:
    """Masters and moments of this rank, each element of them once.

    sharded_model: of every virtual stage, with the parameters themselves in its entries.
    """
    for entry, state, first in runs_of(sharded_model, optimizer):
        for name in (MASTER, *MOMENTS):
            yield from boxes_of(f"{PREFIX}.{name}.", entry, state[name].detach(), first)


def runs_of(
    sharded_model: dict[str, Any], optimizer: MegatronOptimizer
) -> Iterator[tuple[Any, dict[str, Tensor], int]]:
    """Of each parameter's run on this rank: its entry, master and moments [R], and its first element."""
    entries = {id(entry.data): entry for entry in nested_values(sharded_model)}
    for part in parts_of(optimizer):
        for ranges in part.gbuf_ranges:
            for bucket in (each for buckets in ranges.values() for each in buckets):
                for parameter, range_of in bucket["param_map"].items():
                    state = part._get_main_param_and_optimizer_states(parameter)
                    yield entries[id(parameter)], state, range_of["param"].start


def parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """megatron-core chains an optimizer per kind of process group; those that have parameters here."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]


def load(reader: ShardsReader, held: Sequence[Held]) -> None:
    """Read each part into its memory; Misfit where a tensor is missing or has another shape."""
    shapes = reader.shapes()
    for each in held:
        name = each.part.name
        if shapes.get(name) != each.part.shape:
            found = f"is {list(shapes[name])}" if name in shapes else "is missing"
            raise Misfit(f"{name} {found}, the model has {list(each.part.shape)}")
    for each in held:
        each.values.copy_(reader.read(each.part))


def boxes_of(prefix: str, entry: Any, values_R: Tensor, first: int) -> Iterator[Held]:
    """What is the run of R elements from `first` on of a flattened parameter, box by box.

    prefix: before the parameter's name, in the parts' names.
    """
    last = first + values_R.numel()
    for start, shard in _pieces(entry):
        begin, end = max(first, start), min(last, start + math.prod(shard.local_shape))
        if begin >= end:
            continue
        own_axes = (0,) * shard.prepend_axis_num
        at = begin
        for offset, size in boxes(shard.local_shape, begin - start, end - start):
            elements = math.prod(size)
            place = tuple(a + b for a, b in zip(shard.global_offset, (*own_axes, *offset), strict=True))
            whole_size = (*(1 for _ in own_axes), *size)
            part = Part(f"{prefix}{shard.key}", tuple(shard.global_shape), place, whole_size)
            values = values_R[at - first : at - first + elements].view(whole_size)
            # The last coordinate counts data-parallel ranks, each of which has a run of its own.
            yield Held(part, values, is_main_replica((*shard.replica_id[:2], 0)))
            at += elements


def _pieces(entry: Any) -> Iterator[tuple[int, ShardedTensor]]:
    """The tensors that a parameter is saved as (gate and up projection lie in one), and where each begins."""
    if not isinstance(entry, ShardedTensorFactory):
        yield 0, entry
        return
    shape_only = torch.empty(entry.data.shape, device="meta")
    built = entry.build_fn(entry.key, shape_only, entry.replica_id, entry.flattened_range)
    for shard in nested_values(built):
        if not shard.data.is_contiguous():
            raise ValueError(f"{shard.key} is no run of its parameter's memory.")
        yield shard.data.storage_offset(), shard


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offset and size of the fewest boxes that make elements [start, stop) of a flattened array, in order."""
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    whole_from, whole_to = -(-start // row), stop // row
    if whole_from > whole_to:  # within one row
        yield from _in_row(shape, whole_to, start - whole_to * row, stop - whole_to * row)
        return
    if start < whole_from * row:
        yield from _in_row(shape, whole_from - 1, start - (whole_from - 1) * row, row)
    if whole_from < whole_to:
        rest = tuple(shape[1:])
        yield (whole_from, *(0 for _ in rest)), (whole_to - whole_from, *rest)
    if whole_to * row < stop:
        yield from _in_row(shape, whole_to, 0, stop - whole_to * row)


def _in_row(
    shape: Sequence[int], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offset, size in boxes(shape[1:], start, stop):
        yield (row, *offset), (1, *size)
