"""Block-diffusion attention from two calls of kernels that know only simple masks.

    interval   every row against all clean keys, of which it sees one interval
    own block  the noisy rows of a block against the noisy keys of their noise group up to the block's end:
               short sequences, nothing hidden; blocks of one group each bring the keys that they share

The results merge exactly by the log-sum-exp of the scores. Given the merged output and log-sum-exp, the
backward pass of each call is its part of the gradient (FlashAttention-2, arXiv 2307.08691, algorithm 2). A
mask without a clean copy is the first call alone.

Legend: Q queries, K keys, B batch, H heads, Hkv key and value heads, D head dim, L clean keys, n noisy rows
of a sample, T = B n, U noisy keys that some block sees, N blocks.
"""

from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llada_megatron.attention.mask import Rectangle
from llada_megatron.runtime.device import sent

HIDDEN_SCORE = -1e9
"""Finite: a row of a document's first block sees no clean key, and -inf would give NaN."""
PADDING_TOKENS = 4096
"""The number of blocks is padded by up to so many tokens of empty ones, so that few numbers occur: cuDNN
compiles a graph for each."""

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Interval:
    """The clean keys that each row sees, int32 [B, Q] each, counted from the first clean key."""

    start: Tensor
    stop: Tensor


@dataclass(frozen=True, eq=False)
class OwnBlocks:
    """Noisy rows, sample by sample and in order, and their noisy keys as N sequences."""

    longest: int
    """No block has more rows."""
    most_keys: int
    """No block sees more of the keys."""
    row_edges: Tensor
    """int32 [N + 1], first row of each block and the end, in [0, T]."""
    key_edges: Tensor
    """int32 [N + 1], the same of its keys, in [0, U]."""
    keys: Tensor
    """int64 [U], where each key lies in [K B]."""
    shares_keys: bool
    """Whether some key is there more than once: several blocks of a group see it."""


class Call[Seen](Protocol):
    """One of the two calls. `seen` is an Interval, with a hidden key's score HIDDEN_SCORE, or OwnBlocks.

    Interval: query, out, grad_out [Q, B, H, D]; key, value [L, B, Hkv, D]; lse [Q, B, H].
    OwnBlocks: query, out, grad_out [T, H, D]; key, value [U, Hkv, D]; lse [T, H].
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, seen: Seen, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return out, and lse in float32 or wider: the log-sum-exp of every row of scores."""

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        seen: Seen,
        scale: float,
    ) -> Gradients:
        """Return the gradients of query, key and value; `out` and `lse` are those of both calls together."""


@dataclass(frozen=True)
class TwoCalls:
    """What computes the two calls."""

    interval: Call[Interval]
    own_block: Call[OwnBlocks]


@dataclass(frozen=True, eq=False)
class Plan:
    """A rectangle as tensors on one device."""

    noisy_keys: int
    seen: Interval
    blocks: OwnBlocks | None


# Every layer of a model uses one rectangle within a micro-batch, so its plan is made once.
_plans: WeakKeyDictionary[Rectangle, dict[torch.device, Plan]] = WeakKeyDictionary()


def two_call_attention(
    query: Tensor, key: Tensor, value: Tensor, rectangle: Rectangle, softmax_scale: float, calls: TwoCalls
) -> Tensor:
    """Return the attention output [Q, B, H, D]; query [Q, B, H, D], key and value [K, B, Hkv, D]."""
    plans = _plans.setdefault(rectangle, {})
    if query.device not in plans:
        plans[query.device] = plan_of(rectangle, query.device)
    return _TwoCallAttention.apply(query, key, value, plans[query.device], calls, softmax_scale)


def plan_of(rectangle: Rectangle, device: torch.device) -> Plan:
    """Return the intervals and the blocks of a rectangle; takes O(B (n + L)) time and memory."""
    mask, noisy_keys = rectangle.mask, rectangle.noisy_keys.shape[1]
    if mask.clean_copy:
        seen = [rectangle.past, rectangle.past_and_block]
    else:
        seen = [rectangle.past_and_block if mask.causal else rectangle.document]
    start, stop = (
        sent(torch.from_numpy((np.concatenate(edges, axis=1) - noisy_keys).astype(np.int32)), device)
        for edges in ([spans.start for spans in seen], [spans.stop for spans in seen])
    )
    return Plan(
        noisy_keys, Interval(start, stop), _own_blocks(rectangle, device) if mask.clean_copy else None
    )


def _own_blocks(rectangle: Rectangle, device: torch.device) -> OwnBlocks:
    mask, own = rectangle.mask, rectangle.own_block
    begins = np.ones_like(own.stop, dtype=bool)
    begins[:, 1:] = own.stop[:, 1:] != own.stop[:, :-1]
    lengths = (own.stop - own.start)[begins]
    row_edges = np.append(np.flatnonzero(begins), begins.size)
    key_edges = np.append(0, lengths.cumsum())
    within = np.arange(key_edges[-1]) - np.repeat(key_edges[:-1], lengths)
    key = np.repeat(own.start[begins], lengths) + within
    sample = np.repeat(np.nonzero(begins)[0], lengths)
    empty_blocks = -len(lengths) % max(1, PADDING_TOKENS // mask.block_size)
    row_edges, key_edges = (
        sent(torch.from_numpy(np.pad(edges, (0, empty_blocks), mode="edge").astype(np.int32)), device)
        for edges in (row_edges, key_edges)
    )
    keys = sent(torch.from_numpy(key * rectangle.batch + sample), device)
    return OwnBlocks(mask.block_size, mask.group_tokens, row_edges, key_edges, keys, mask.has_groups)


def _put(grad: Tensor, blocks: OwnBlocks, of_own: Tensor) -> None:
    """Write the gradients of the blocks' keys [U, ...] to those of all keys [K B, ...], which are zero."""
    if not blocks.shares_keys:
        grad.index_copy_(0, blocks.keys, of_own)
        return
    wide = torch.zeros_like(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    grad.add_(wide.index_add_(0, blocks.keys, of_own.to(wide.dtype)).to(grad.dtype))


def _by_sample(noisy_rows: Tensor) -> Tensor:
    """[n, B, ...] -> [T, ...]."""
    return noisy_rows.transpose(0, 1).flatten(0, 1).contiguous()


class _TwoCallAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, calls: TwoCalls, softmax_scale: float
    ) -> Tensor:
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        clean_key, clean_value = (tensor[plan.noisy_keys :] for tensor in (key, value))
        output, lse = calls.interval.forward(query, clean_key, clean_value, plan.seen, softmax_scale)
        if plan.blocks is not None:
            noisy = query.size(0) // 2
            own_key, own_value = (
                tensor.flatten(0, 1).index_select(0, plan.blocks.keys) for tensor in (key, value)
            )
            results = calls.own_block.forward(
                _by_sample(query[:noisy]), own_key, own_value, plan.blocks, softmax_scale
            )
            own, own_lse = (part.unflatten(0, (-1, noisy)).transpose(0, 1) for part in results)
            weight = torch.sigmoid(own_lse - lse[:noisy])[..., None]
            merged = output[:noisy].to(weight.dtype).lerp(own.to(weight.dtype), weight)
            output[:noisy], lse[:noisy] = merged, torch.logaddexp(own_lse, lse[:noisy])
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.plan, ctx.calls, ctx.softmax_scale = plan, calls, softmax_scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        plan: Plan = ctx.plan
        grad_output = grad_output.contiguous()
        clean = (tensor[plan.noisy_keys :] for tensor in (key, value))
        grad_query, *grad_clean = ctx.calls.interval.backward(
            grad_output, query, *clean, output, lse, plan.seen, ctx.softmax_scale
        )
        if plan.blocks is None:
            return grad_query, *grad_clean, None, None, None
        grads = torch.zeros_like(key), torch.zeros_like(value)
        noisy = query.size(0) // 2
        grad_rows, query_rows, output_rows, lse_rows = (
            _by_sample(tensor[:noisy]) for tensor in (grad_output, query, output, lse)
        )
        own_keys = (tensor.flatten(0, 1).index_select(0, plan.blocks.keys) for tensor in (key, value))
        grad_own_query, *grad_own = ctx.calls.own_block.backward(
            grad_rows, query_rows, *own_keys, output_rows, lse_rows, plan.blocks, ctx.softmax_scale
        )
        grad_query[:noisy] += grad_own_query.unflatten(0, (-1, noisy)).transpose(0, 1)
        for grad, of_clean, of_own in zip(grads, grad_clean, grad_own, strict=True):
            grad[plan.noisy_keys :] = of_clean
            _put(grad.flatten(0, 1), plan.blocks, of_own)
        return grad_query, *grads, None, None, None
