"""The experts of a layer, of which a forward without gradients needs the matrix products alone.

Legend: N rows sorted by expert, H hidden size, F width of an expert, on this rank.
"""

from __future__ import annotations

import torch
from megatron.core.fusions.fused_bias_swiglu import weighted_swiglu
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor


class Experts(SequentialMLP):
    """megatron-core's experts one after the other, and the same numbers in less time where nothing is learnt.

    A decoding step has few rows for each of many experts, and the modules around a product (autograd
    functions, groups that are looked up, warnings) take longer than it does.
    """

    def forward(
        self, rows_NH: Tensor, rows_per_expert: Tensor, weight_N: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What the experts make of their rows, [N, H], each row times its weight; no bias."""
        layers = self.local_experts[0].linear_fc1, self.local_experts[0].linear_fc2
        has_adapters = [type(layer) for layer in layers] != [ColumnParallelLinear, RowParallelLinear]
        if self.training or torch.is_grad_enabled() or has_adapters:
            return super().forward(rows_NH, rows_per_expert, weight_N)
        counts = rows_per_expert.tolist()
        first = [expert.linear_fc1.weight for expert in self.local_experts]  # [2F, H]
        second = [expert.linear_fc2.weight for expert in self.local_experts]  # [H, F]
        return _products(
            weighted_swiglu(_products(rows_NH, counts, first), weight_N[:, None]), counts, second
        ), None


def _products(rows: Tensor, counts: list[int], weights: list[Tensor]) -> Tensor:
    """Each expert's rows times its weights [out, in]."""
    results = rows.new_empty(rows.shape[0], weights[0].shape[0])
    for part, result, weight in zip(rows.split(counts), results.split(counts), weights, strict=True):
        if part.shape[0]:
            torch.mm(part, weight.t(), out=result)
    return results
