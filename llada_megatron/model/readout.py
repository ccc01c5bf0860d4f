"""Readouts: what the head says about each row that it is applied to.

Each works on one chunk of rows, with the vocabulary split over the tensor-parallel ranks: but for LOGITS,
which are asked for whole, only a few numbers per row travel.

Legend: n rows of a chunk, V vocabulary, tp tensor-parallel ranks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
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


def _fused_cross_entropy(logits_nV: Tensor, labels_n: Tensor | None, group: Any) -> Tensor:
    assert labels_n is not None
    if not len(labels_n):  # which its kernel refuses
        return _cross_entropy(logits_nV, labels_n, group)
    engine = importlib.import_module("megatron.core.extensions.transformer_engine")
    return engine.te_parallel_cross_entropy(logits_nV[:, None], labels_n[:, None], group)[:, 0]


def _logits(logits_nV: Tensor, labels_n: Tensor | None, group: Any) -> Tensor:
    return gather_from_tensor_model_parallel_region(logits_nV, group)


@torch.no_grad()
def _top_one(logits_nV: Tensor, labels_n: Tensor | None, group: Any) -> Tensor:
    logits_nV = logits_nV.float()
    largest_n, choice_n = _argmax(logits_nV, group)
    sum_n = (logits_nV - largest_n[:, None]).exp().sum(dim=-1)
    dist.all_reduce(sum_n, group=group)
    return torch.stack([choice_n.double(), sum_n.reciprocal().double()], dim=-1)


def _confidence(temperature: float, logits_nV: Tensor, labels_n: Tensor | None, group: Any) -> Tensor:
    return _Confidence.apply(logits_nV.float(), labels_n, group, temperature)


CROSS_ENTROPY = Readout("cross entropy", columns=1, needs_labels=True, read=_cross_entropy)
"""fp32 [n], nats."""
LOGITS = Readout("logits", columns=0, needs_labels=False, read=_logits)
"""[n, V] in the model's dtype, gathered from all ranks."""
TOP_ONE = Readout("top-1", columns=2, needs_labels=False, read=_top_one)
"""float64 [n, 2]: the most probable token, the lowest id among equals, and its probability; no gradient.

float64, because float32 has not every id above 2^24, and bfloat16 not even those above 256.
"""


def fused(readout: Readout) -> Readout:
    """CROSS_ENTROPY by TransformerEngine's kernel, which computes in fp32 without logits in fp32; others as
    they are."""
    return replace(readout, read=_fused_cross_entropy) if readout == CROSS_ENTROPY else readout


def confidence(temperature: float = 1.0) -> Readout:
    """fp32 [n, 3]: cross entropy, entropy of softmax(logits / temperature), whether TOP_ONE's token is right.

    The first two are in nats and have gradients; the third is 1.0 or 0.0.
    """
    name = "confidence" if temperature == 1 else f"confidence at {temperature:g}"
    return Readout(name, columns=3, needs_labels=True, read=partial(_confidence, temperature))


CONFIDENCE = confidence()


def without_token(readout: Readout, token_id: int) -> Readout:
    """The readout of a model that never gives one token, the mask: its logit counts as minus infinity."""

    def read(logits_nV: Tensor, labels_n: Tensor | None, group: Any) -> Tensor:
        return readout.read(_hidden(logits_nV, token_id, group), labels_n, group)

    return replace(readout, name=f"{readout.name} without {token_id}", read=read)


def _hidden(logits_nV: Tensor, token_id: int, group: Any) -> Tensor:
    column = token_id - group.rank() * logits_nV.shape[-1]
    if not 0 <= column < logits_nV.shape[-1]:
        return logits_nV
    hidden_V = torch.arange(logits_nV.shape[-1], device=logits_nV.device) == column
    # The lowest finite number: an entropy multiplies probabilities by logits.
    return logits_nV.masked_fill(hidden_V, torch.finfo(logits_nV.dtype).min / 2)


def choice(mask_token_id: int) -> Readout:
    """float64 [n]: the most probable token but the mask, the lowest id among equals; no gradient."""
    return Readout("choice", columns=1, needs_labels=False, read=partial(_choice, mask_token_id))


@torch.no_grad()
def _choice(mask_token_id: int, logits_nV: Tensor, labels_n: Tensor | None, group: Any) -> Tensor:
    _, choice_n = _argmax(_hidden(logits_nV.float(), mask_token_id, group), group)
    return choice_n.double()


def proposal(mask_token_id: int, *, entropy: bool = False) -> Readout:
    """float64 [n, 2]: what a decoder may put in place of a mask, no gradient.

    The most probable token but the mask, the lowest id among equals, and its probability among all tokens.
    With `entropy` float64 [n, 3]: and the entropy of the distribution over all tokens, in nats.
    """
    name, columns = ("proposal and entropy", 3) if entropy else ("proposal", 2)
    read = partial(_proposal, mask_token_id, entropy)
    return Readout(name, columns, needs_labels=False, read=read)


@torch.no_grad()
def _proposal(
    mask_token_id: int, entropy: bool, logits_nV: Tensor, labels_n: Tensor | None, group: Any
) -> Tensor:
    logits_nV = logits_nV.float()
    largest_n, choice_n = _argmax(_hidden(logits_nV, mask_token_id, group), group)
    shifted_nV = logits_nV - largest_n[:, None]
    shifted_nV.clamp_(max=60)  # the mask's own logit may be the larger one, by any amount
    exp_nV = shifted_nV.exp() if entropy else shifted_nV.exp_()
    sums = [exp_nV.sum(dim=-1)]
    if entropy:
        sums.append(exp_nV.mul_(shifted_nV).sum(dim=-1))
    reduced = torch.stack(sums)
    dist.all_reduce(reduced, group=group)
    sum_n, *weighted_n = reduced.double()
    figures = [choice_n.double(), sum_n.reciprocal()]
    return torch.stack(figures + [sum_n.log() - part_n / sum_n for part_n in weighted_n], dim=-1)


class _Confidence(torch.autograd.Function):
    """Works in place, on the logits in forward and on what it kept in backward, as megatron-core's cross
    entropy does: passes over n V numbers are what a readout costs.
    """

    @staticmethod
    def forward(ctx: Any, logits_nV: Tensor, labels_n: Tensor, group: Any, temperature: float) -> Tensor:
        largest_n, choice_n = _argmax(logits_nV, group)
        logits_nV.sub_(largest_n[:, None])
        label_n1, is_here_n1 = _columns_here(labels_n, logits_nV, group)
        label_logit_n = logits_nV.gather(1, label_n1).where(is_here_n1, 0)[:, 0]
        cooled_nV = logits_nV if temperature == 1 else _finite(logits_nV / temperature)
        exp_nV = cooled_nV.exp()
        cooled_sum_n = exp_nV.sum(dim=-1)
        sum_n = cooled_sum_n if temperature == 1 else logits_nV.exp().sum(dim=-1)
        sums_4n = torch.stack([label_logit_n, sum_n, cooled_sum_n, exp_nV.mul_(cooled_nV).sum(dim=-1)])
        dist.all_reduce(sums_4n, group=group)
        label_logit_n, sum_n, cooled_sum_n, weighted_n = sums_4n
        log_sum_n, cooled_log_sum_n = sum_n.log(), cooled_sum_n.log()
        entropy_n = cooled_log_sum_n - weighted_n / cooled_sum_n
        log_p_nV = logits_nV.sub_(log_sum_n[:, None])
        shift_n = cooled_log_sum_n - log_sum_n / temperature  # log q = log p / T - shift
        ctx.temperature = temperature
        ctx.save_for_backward(log_p_nV, shift_n, entropy_n, label_n1, is_here_n1)
        correct_n = (choice_n == labels_n).to(entropy_n.dtype)
        return torch.stack([log_sum_n - label_logit_n, entropy_n, correct_n], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_n3: Tensor) -> tuple[Tensor | None, ...]:
        """With p = softmax(z) and q = softmax(z / T):

        dCE/dz_i = p_i - [i is the label],  dH(q)/dz_i = -q_i (log q_i + H) / T.
        """
        log_p_nV, shift_n, entropy_n, label_n1, is_here_n1 = ctx.saved_tensors
        of_cross_entropy_n1, of_entropy_n1, _ = gradient_n3.split(1, dim=-1)
        if ctx.temperature == 1:
            slope_nV = (log_p_nV + entropy_n[:, None]).mul_(-of_entropy_n1).add_(of_cross_entropy_n1)
            gradient_nV = slope_nV.mul_(log_p_nV.exp_())
        else:
            log_q_nV = _finite((log_p_nV / ctx.temperature).sub_(shift_n[:, None]))
            q_nV = log_q_nV.exp()
            gradient_nV = log_q_nV.add_(entropy_n[:, None]).mul_(q_nV).mul_(-of_entropy_n1 / ctx.temperature)
            gradient_nV += log_p_nV.exp_().mul_(of_cross_entropy_n1)
        gradient_nV.scatter_add_(1, label_n1, -of_cross_entropy_n1.where(is_here_n1, 0))
        return gradient_nV, None, None, None


def _finite(logits_nV: Tensor) -> Tensor:
    """In place: a hidden token's logit over a small temperature overflows, and 0 * inf is no entropy."""
    return logits_nV.clamp_(min=torch.finfo(logits_nV.dtype).min / 2)


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
