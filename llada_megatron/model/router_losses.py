"""Losses of a router's own: on large logits, and on experts that a sequence uses unevenly.

Both are added to the training loss for each layer with experts (docs/experts.md):

    z_loss            times  mean over rows of (log sum_i exp x_i)^2        ST-MoE, arXiv 2202.08906, eq. 5
    sequence_balance  times  mean over sequences of sum_i f_i P_i           DeepSeek-V3, arXiv 2412.19437,
    f_i = E/(k T) sum_t [i is among the k largest s_t],   P_i = 1/T sum_t s_ti / sum_j s_tj        eq. 17-20

x are logits, s their scores (model.expert_score) without the bias of selection; T rows of a sequence.
megatron-core 0.19.2 has both (router.py: apply_z_loss, _apply_seq_aux_loss) and multiplies them by a
micro-batch's rows where the loss is a sum over tokens: right where it counts as many tokens as there are
rows, as `[x_t ; x_0]` never has.

Legend: S rows of a sequence on this rank, B sequences, E experts, k of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def expert_scores(logits: Tensor, score_function: str) -> Tensor:
    """What experts are chosen by, but for the bias: fp32, of the shape of logits [..., E]."""
    return logits.float().sigmoid() if score_function == "sigmoid" else logits.float().softmax(dim=-1)


def squared_log_sums(logits_SBE: Tensor) -> Tensor:
    """The sum over rows of (log sum_i exp x_i)^2, fp32 scalar."""
    return logits_SBE.float().logsumexp(dim=-1).square().sum()


def sequence_balance(scores_SBE: Tensor, ignored_SB: Tensor | None, k: int, group: Any) -> Tensor:
    """This rank's part of the sum over sequences of sum_i f_i P_i, fp32 scalar.

    f is that of whole sequences, whose rows lie on the ranks of `group`; it has no gradient. P adds up over
    them, so the parts do. ignored_SB: bool, True for rows that do not count.
    """
    E = scores_SBE.shape[-1]
    share_SBE = scores_SBE / scores_SBE.sum(dim=-1, keepdim=True)
    with torch.no_grad():
        chosen_SBE = torch.zeros_like(scores_SBE).scatter_(-1, scores_SBE.topk(k, dim=-1).indices, 1.0)
        if ignored_SB is not None:
            chosen_SBE *= ~ignored_SB[..., None]
        chosen_BE = chosen_SBE.sum(dim=0)
        if group.size() > 1:
            dist.all_reduce(chosen_BE, group=group)
        rows_B1 = chosen_BE.sum(dim=-1, keepdim=True) / k
        f_BE = chosen_BE * E / (k * rows_B1)
    if ignored_SB is not None:
        share_SBE = share_SBE * ~ignored_SB[..., None]
    return (f_BE * share_SBE.sum(dim=0) / rows_B1).sum()


class _AlsoLearn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones_like(ctx.saved_tensors[0])


def also_learn(output: Tensor, loss: Tensor) -> Tensor:
    """`output`, whose backward pass is that of `loss` as well."""
    return _AlsoLearn.apply(output, loss)
