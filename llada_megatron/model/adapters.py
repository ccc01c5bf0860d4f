"""Low-rank adapters (LoRA, arXiv 2106.09685) beside megatron-core's linear layers, under TP, SP, EP and ETP.

    y = W x + (alpha / rank) B A x,   A [rank, in], B [out, rank] zero at the start, W frozen

What is split follows W. A dense layer that splits its outputs splits B and keeps A whole: A is applied to the
rows that a rank has under sequence parallelism, and the gathered result has `rank` columns instead of `in`.
One that splits its inputs splits A and reduces `rank` columns instead of `out`. The factor that stays whole
sees a part of the rows, so its gradient is summed over the ranks as that of a norm is (`sequence_parallel`).
An expert's layers neither gather nor reduce (the dispatcher does): there the whole factor is split over the
rank's own axis, so that every gradient is complete where it is.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    reduce_scatter_last_dim_to_tensor_parallel_region,
)
from megatron.core.transformer.mlp import MLPSubmodules, apply_swiglu_sharded_factory
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from llada_megatron.config.choices import AdapterTarget
from llada_megatron.config.schema import LoraConfig

A, B = "lora_a", "lora_b"


def is_adapter(key: str) -> bool:
    """Whether a parameter of this name, in the model or in a checkpoint, belongs to an adapter."""
    return key.endswith((f".{A}", f".{B}"))


class _Adapted:
    """What both kinds of layer share; the axis of a factor is None where every rank holds it whole."""

    weight: torch.nn.Parameter
    is_expert: bool
    is_gated: bool
    sequence_parallel: bool
    tp_group: Any
    lora: LoraConfig

    def add_factors(self, *, a_axis: int | None, b_axis: int | None) -> None:
        """lora_a [rank, in] and lora_b [out, rank], of which this rank holds a part of the given axes."""
        out, width = self.weight.shape  # of this rank
        ways = self.tp_group.size() if self.is_expert else 1
        rank_a = self.lora.rank // (ways if a_axis == 0 else 1)
        rank_b = self.lora.rank // (ways if b_axis == 1 else 1)
        self.lora_a = self._factor(a_axis, rank_a, width)
        self.lora_b = self._factor(b_axis, out, rank_b)
        self.axes = {A: a_axis, B: b_axis}

    def _factor(self, axis: int | None, *shape: int) -> torch.nn.Parameter:
        factor = torch.nn.Parameter(self.weight.new_empty(shape))
        factor.allreduce = self.weight.allreduce  # type: ignore[attr-defined]
        if axis is None:
            factor.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        else:
            set_tensor_model_parallel_attributes(factor, is_parallel=True, dim=axis, stride=1)
        return factor

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """The layer's, and how the factors are split."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        axes = {name: axis for name, axis in self.axes.items() if axis is not None}
        group = metadata["dp_cp_group"]
        sharded |= make_sharded_tensors_for_checkpoint(
            {A: self.lora_a, B: self.lora_b},
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=group,
        )
        if self.is_gated:  # rows [gate; up] of each rank, as of the weight
            sharded[prefix + B] = apply_swiglu_sharded_factory(
                sharded[prefix + B], sharded_offsets, tp_group=self.tp_group, dp_group=group
            )
        return sharded

    def scaled(self, low_TBr: Tensor) -> Tensor:
        return self.lora.alpha / self.lora.rank * F.linear(low_TBr, self.lora_b)


class AdaptedColumn(_Adapted, ColumnParallelLinear):
    """A layer whose outputs are split."""

    def __init__(self, *args: Any, lora: LoraConfig, stride: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, stride=stride, **kwargs)
        self.lora, self.is_gated = lora, stride == 2
        self.add_factors(a_axis=0 if self.is_expert else None, b_axis=0)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the layer's."""
        output, bias = super().forward(input_, *args, **kwargs)
        low = F.linear(input_, self.lora_a)
        if self.is_expert:
            low = all_gather_last_dim_from_tensor_parallel_region(low, group=self.tp_group)
        elif self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp_group)
        return output + self.scaled(low), bias


class AdaptedRow(_Adapted, RowParallelLinear):
    """A layer whose inputs are split."""

    is_gated = False

    def __init__(self, *args: Any, lora: LoraConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora = lora
        self.add_factors(a_axis=1, b_axis=1 if self.is_expert else None)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """As the layer's."""
        output, bias = super().forward(input_)
        low = F.linear(input_, self.lora_a)
        if self.is_expert:
            low = reduce_scatter_last_dim_to_tensor_parallel_region(low, group=self.tp_group)
        elif self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        return output + self.scaled(low), bias


def adapt(layer: ModuleSpec, lora: LoraConfig) -> None:
    """Put adapters into a layer of the local spec, beside the linear layers that are targets."""
    column, row = partial(AdaptedColumn, lora=lora), partial(AdaptedRow, lora=lora)
    submodules, targets = layer.submodules, set(lora.targets)
    if AdapterTarget.attention in targets:
        attention = submodules.self_attention.submodules
        attention.linear_qkv, attention.linear_proj = column, row

    def with_adapters(builder: partial[Any]) -> partial[Any]:
        adapted = replace(builder.keywords["submodules"], linear_fc1=column, linear_fc2=row)
        assert isinstance(adapted, MLPSubmodules)
        return partial(builder.func, *builder.args, **{**builder.keywords, "submodules": adapted})

    if submodules.mlp.func is not MoELayer:
        if AdapterTarget.dense in targets:
            submodules.mlp = with_adapters(submodules.mlp)
        return
    parts = submodules.mlp.keywords["submodules"]
    if AdapterTarget.experts in targets:
        parts = replace(parts, experts=with_adapters(parts.experts))
    if AdapterTarget.shared_experts in targets:
        parts = replace(parts, shared_experts=with_adapters(parts.shared_experts))
    submodules.mlp = partial(MoELayer, submodules=parts)
