"""Initial weights as a function of (seed, global parameter name, global element index)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from llada_megatron.model.gpt import BlockDiffusionStage
from llada_megatron.model.normal import ELEMENTS_PER_CALL, counter_normal

SHARDING_METADATA = {"non_homogeneous_layers": True}
"""Each layer keeps a name of its own in checkpoints, whatever the architecture."""


def initialize_weights(model: BlockDiffusionStage, *, seed: int, std: float, layers: int) -> None:
    """Fill every parameter of this shard in place; no rank holds a tensor that it owns only a part of.

    Matrices are N(0, std^2), the projections back into the residual stream N(0, std^2 / (2 layers)), norms
    one, biases zero; of an adapter lora_b is zero and lora_a N(0, 1 / (3 in)), of the variance that PEFT
    draws. Raises RuntimeError if a parameter is left without a value.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
        sharded = model.sharded_state_dict(metadata=SHARDING_METADATA)
        apply_factories(sharded)
        for shard in nested_values(sharded):
            if isinstance(shard, ShardedTensor) and shard.data is not None and shard.data.is_floating_point():
                _fill(shard, seed, std, layers)
    unset = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    if unset:
        raise RuntimeError(f"These parameters have no entry in the sharded state and kept no value: {unset}")


def named_parameters(stage: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Every parameter of this rank under its name in a checkpoint, which knows no layout."""
    for entry in nested_values(stage.sharded_state_dict(metadata=SHARDING_METADATA)):
        if isinstance(entry.data, torch.nn.Parameter):
            yield entry.key, entry.data


def _fill(shard: ShardedTensor, seed: int, std: float, layers: int) -> None:
    if shard.key.endswith(("bias", ".lora_b")):
        shard.data.zero_()
    elif shard.key.endswith(".lora_a"):
        _fill_normal(shard, seed, 1 / math.sqrt(3 * shard.global_shape[-1]))
    elif "norm" in shard.key:
        shard.data.fill_(1.0)
    else:
        residual = shard.key.endswith(("linear_proj.weight", "linear_fc2.weight"))
        _fill_normal(shard, seed, std / math.sqrt(2 * layers) if residual else std)


def _fill_normal(shard: ShardedTensor, seed: int, std: float) -> None:
    data = shard.data
    own_axes = len(shard.global_shape) - data.dim()  # axes that only the global tensor has, such as experts
    strides = [math.prod(shard.global_shape[axis + 1 :]) for axis in range(len(shard.global_shape))]
    base = sum(offset * stride for offset, stride in zip(shard.global_offset, strides, strict=True))
    columns = torch.zeros((), dtype=torch.int64, device=data.device)
    for axis in range(1, data.dim()):
        steps = torch.arange(data.shape[axis], device=data.device) * strides[own_axes + axis]
        columns = columns[..., None] + steps
    rows_per_call = max(1, ELEMENTS_PER_CALL // max(1, columns.numel()))
    for first in range(0, data.shape[0], rows_per_call):
        rows = torch.arange(first, min(first + rows_per_call, data.shape[0]), device=data.device)
        index = base + (rows * strides[own_axes]).view(-1, *[1] * columns.dim()) + columns
        data[first : first + len(rows)].copy_(std * counter_normal(index, seed, shard.key))
