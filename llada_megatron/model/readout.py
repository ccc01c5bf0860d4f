"""Readouts: what the head says about each row that it is applied to.

Each works on one chunk of rows, with the vocabulary split over the tensor-parallel ranks: but for LOGITS,
which are asked for whole, only a few numbers per row travel.

Legend: n rows of a chunk, V vocabulary, tp tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ReduceOp


@dataclass(frozen=True)
class Readout:
    """Figures [n] or [n, columns] of rows, alike on all ranks of the tensor-parallel group.

    `read` takes logits [n, V/tp] of any float dtype, labels int64 [n] or None, and the group.
    """

    name: str
    columns: int
    """Figures per row; 0 stands for one per word of the vocabulary."""
    needs_labels: bool
    read: Callable[[Tensor, Tensor | None, Any], Tensor]

    def __call__(self, logits_nV: Tensor, labels_n: Tensor | None, group: Any) -> Tensor:
        return self.read(logits_nV, labels_n, group)


def _cross_entropy(logits_nV: Tensor, labels_n: Tensor | None, group: Any) -> Tensor:
    return vocab_parallel_cross_entropy(logits_nV.float(), labels_n, tp_group=group)


def _logits(logits_nV: Tensor, labels_n: Tensor | None, group: Any) -> Tensor:
    return gather_from_tensor_model_parallel_region(logits_nV, group)


@torch.no_grad()
def _top_one(logits_nV: Tensor, labels_n: Tensor | None, group: Any) -> Tensor:
    logits_nV = logits_nV.float()
    largest_n, choice_n = _argmax(logits_nV, group)
    sum_n = (logits_nV - largest_n[:, None]).exp().sum(dim=-1)
    dist.all_reduce(sum_n, group=group)
    return torch.stack([choice_n.double(), sum_n.reciprocal().double()], dim=-1)


def _confidence(logits_nV: Tensor, labels_n: Tensor | None, group: Any) -> Tensor:
    return _Confidence.apply(logits_nV.float(), labels_n, group)


CROSS_ENTROPY = Readout("cross entropy", columns=1, needs_labels=True, read=_cross_entropy)
"""fp32 [n], nats."""
LOGITS = Readout("logits", columns=0, needs_labels=False, read=_logits)
"""[n, V] in the model's dtype, gathered from all ranks."""
TOP_ONE = Readout("top-1", columns=2, needs_labels=False, read=_top_one)
"""float64 [n, 2]: the most probable token, the lowest id among equals, and its probability; no gradient.

float64, because float32 has not every id above 2^24, and bfloat16 not even those above 256.
"""
CONFIDENCE = Readout("confidence", columns=3, needs_labels=True, read=_confidence)
"""fp32 [n, 3]: cross entropy and entropy in nats, and 1.0 where TOP_ONE's token is the label, else 0.0.

The first two have gradients.
"""


class _Confidence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_nV: Tensor, labels_n: Tensor, group: Any) -> Tensor:
        largest_n, choice_n = _argmax(logits_nV, group)
        logits_nV = logits_nV - largest_n[:, None]
        label_n1, is_here_n1 = _columns_here(labels_n, logits_nV, group)
        exp_nV = logits_nV.exp()
        label_logit_n = logits_nV.gather(1, label_n1).where(is_here_n1, 0)[:, 0]
        sums_3n = torch.stack([label_logit_n, exp_nV.sum(dim=-1), (exp_nV * logits_nV).sum(dim=-1)])
        dist.all_reduce(sums_3n, group=group)
        label_logit_n, sum_n, weighted_n = sums_3n
        log_sum_n = sum_n.log()
        entropy_n = log_sum_n - weighted_n / sum_n
        ctx.save_for_backward(logits_nV.sub_(log_sum_n[:, None]), entropy_n, label_n1, is_here_n1)
        correct_n = (choice_n == labels_n).to(entropy_n.dtype)
        return torch.stack([log_sum_n - label_logit_n, entropy_n, correct_n], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_n3: Tensor) -> tuple[Tensor | None, ...]:
        """With p = softmax(z): dCE/dz_i = p_i - [i is the label], dH/dz_i = -p_i (log p_i + H)."""
        log_p_nV, entropy_n, label_n1, is_here_n1 = ctx.saved_tensors
        of_cross_entropy_n1, of_entropy_n1, _ = gradient_n3.split(1, dim=-1)
        slope_nV = of_cross_entropy_n1 - of_entropy_n1 * (log_p_nV + entropy_n[:, None])
        gradient_nV = slope_nV.mul_(log_p_nV.exp())
        return gradient_nV.scatter_add_(1, label_n1, -of_cross_entropy_n1.where(is_here_n1, 0)), None, None


def _argmax(logits_nV: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """The largest logit [n] over all ranks and its lowest id, int64 [n]: the same choice for every split."""
    width = logits_nV.shape[-1]
    here_n, choice_n = logits_nV.max(dim=-1)
    largest_n = here_n.clone()
    dist.all_reduce(largest_n, ReduceOp.MAX, group=group)
    choice_n = (choice_n + group.rank() * width).where(here_n == largest_n, group.size() * width)
    dist.all_reduce(choice_n, ReduceOp.MIN, group=group)
    return largest_n, choice_n


def _columns_here(labels_n: Tensor, logits_nV: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Column of each label [n, 1] on this rank, 0 where another rank has it, and whether it is here."""
    width = logits_nV.shape[-1]
    column_n1 = labels_n[:, None] - group.rank() * width
    is_here_n1 = (column_n1 >= 0) & (column_n1 < width)
    return column_n1.where(is_here_n1, 0), is_here_n1
