"""The experts of a layer, of which a forward without gradients needs the matrix products alone.

Legend: N rows sorted by expert, H hidden size, F width of an expert, E experts, on this rank; T tokens,
k experts of each, N = T k.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import weighted_swiglu
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from torch.nn.functional import grouped_mm


class Experts(SequentialMLP):
    """megatron-core's experts one after the other, and the same numbers in less time where nothing is learnt.

    A decoding step has few rows for each of many experts, and the modules around a product (autograd
    functions, groups that are looked up, warnings) take longer than it does.
    """

    _stacked: tuple[Tensor, Tensor] | None = None
    """Weights [E, 2F, H] and [E, H, F], of which the parameters are views."""

    def forward(
        self, rows_NH: Tensor, rows_per_expert: Tensor, weight_N: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What the experts make of their rows, [N, H], each row times its weight; no bias."""
        if self.training or torch.is_grad_enabled() or self.has_adapters:
            return super().forward(rows_NH, rows_per_expert, weight_N)
        if self._stacked is not None:
            ends_E = rows_per_expert.cumsum(0).to(torch.int32)
            first_EFH, second_EHF = (weights.transpose(1, 2) for weights in self._stacked)
            inner_NF = weighted_swiglu(grouped_mm(rows_NH, first_EFH, offs=ends_E), weight_N[:, None])
            return grouped_mm(inner_NF, second_EHF, offs=ends_E), None
        counts = rows_per_expert.tolist()
        first = [expert.linear_fc1.weight for expert in self.local_experts]  # [2F, H]
        second = [expert.linear_fc2.weight for expert in self.local_experts]  # [H, F]
        return _products(
            weighted_swiglu(_products(rows_NH, counts, first), weight_N[:, None]), counts, second
        ), None

    @property
    def has_adapters(self) -> bool:
        """Whether something stands beside a product."""
        layers = self.local_experts[0].linear_fc1, self.local_experts[0].linear_fc2
        return [type(layer) for layer in layers] != [ColumnParallelLinear, RowParallelLinear]

    @torch.no_grad()
    def stack(self) -> None:
        """Lay the weights side by side, for one product that reads on the device where an expert's rows end.

        A layer's weights are there twice while it works. Parameters become views: not for a model that a
        buffer of gradients or an optimizer knows.
        """
        if self._stacked is not None:
            return
        stacked = []
        for name in ("linear_fc1", "linear_fc2"):
            parameters = [getattr(expert, name).weight for expert in self.local_experts]
            stacked.append(torch.stack([parameter.data for parameter in parameters]))
            for parameter, weights in zip(parameters, stacked[-1], strict=True):
                parameter.data = weights
        self._stacked = stacked[0], stacked[1]


class OwnDispatcher:
    """Brings tokens to experts that are all on this rank, as many as there are however they choose.

    Stands in for megatron-core's dispatchers in a MoELayer: those read on the host how many tokens go where
    (`_maybe_dtoh_and_synchronize`, token_dispatcher.py:913 in 0.19.2), which a CUDA graph cannot. The results
    of a token are added up in a fixed order.
    """

    def __init__(self, experts_per_token: int) -> None:
        self.experts_per_token = experts_per_token

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map_TE: Tensor, weight_TE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The rows [N, H] of tokens [..., H], by expert and within one by token, and their weights [N]."""
        k = self.experts_per_token
        expert_Tk = routing_map_TE.int().topk(k, dim=1).indices
        self._order = expert_Tk.flatten().argsort(stable=True)
        self._rows_per_expert = routing_map_TE.sum(dim=0)
        self._shape = tokens.shape
        rows_NH = tokens.flatten(0, -2).index_select(0, self._order // k)
        return rows_NH, weight_TE.gather(1, expert_Tk).flatten().index_select(0, self._order)

    def token_dispatch(self, rows_NH: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing travels."""
        return rows_NH, weight_N

    def dispatch_postprocess(self, rows_NH: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows, how many each expert has, [E] on the device, and their weights."""
        return rows_NH, self._rows_per_expert, weight_N

    def get_expert_zero_copy_buffers(self) -> tuple[None, None]:
        """None: experts make their results themselves."""
        return None, None

    def combine_preprocess(self, results_NH: Tensor) -> Tensor:
        """Nothing to do."""
        return results_NH

    def token_combine(self, results_NH: Tensor) -> Tensor:
        """Nothing travels."""
        return results_NH

    def combine_postprocess(self, results_NH: Tensor) -> Tensor:
        """The sum of each token's results, in the shape of the tokens."""
        by_token = torch.empty_like(results_NH).index_copy_(0, self._order, results_NH)
        return by_token.unflatten(0, (-1, self.experts_per_token)).sum(dim=1).view(self._shape)


def keep_on_device(model: Any) -> None:
    """Let the experts of a model that is only decoded work without numbers on the host.

    For experts that `Experts` computes and that are all on this rank (layout.ep=1, layout.etp=1).
    """
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.experts.stack()
            layer.token_dispatcher = OwnDispatcher(layer.config.moe_router_topk)


def _products(rows: Tensor, counts: list[int], weights: list[Tensor]) -> Tensor:
    """Each expert's rows times its weights [out, in]."""
    results = rows.new_empty(rows.shape[0], weights[0].shape[0])
    for part, result, weight in zip(rows.split(counts), results.split(counts), weights, strict=True):
        if part.shape[0]:
            torch.mm(part, weight.t(), out=result)
    return results
