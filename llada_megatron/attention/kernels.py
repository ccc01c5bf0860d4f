"""Attention of a batch of tiles, with the log-sum-exp that lets results over parts of the keys be merged.

Legend: T tiles, H heads, q queries and k keys of a tile, D key width, Dv value width.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores that the plain kernel holds at a time: 64 MiB of float32.
MAX_SCORES = 1 << 24

Gradients = tuple[Tensor, Tensor, Tensor]


class Kernel(Protocol):
    """Both directions of softmax(scale * Q K^T + bias) V.

    query [T, H, q, D]; key [T, H, k, D]; value [T, H, k, Dv]; out, grad_out [T, H, q, Dv]; bias
    [T or 1, 1, q or 1, k] of the query's dtype or None; lse [T, H, q], float32 or wider.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return out and lse, the log-sum-exp of every row of scores."""

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        bias: Tensor | None,
        scale: float,
    ) -> Gradients:
        """Return the gradients of query, key and value.

        `out` and `lse` may be those over more keys than these: the parts of a gradient add up to the whole
        (FlashAttention-2, arXiv 2307.08691, algorithm 2). Rows whose lse is +inf contribute nothing.
        """


class CpuKernel:
    """PyTorch's fused CPU kernel: float64, float32, bfloat16, float16.

    It has one width for keys and values: the narrower of them is filled up with zeros.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        width = value.size(-1)
        query, key, value = _equally_wide(query, key, value)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=bias, scale=scale
        )
        return out[..., :width], lse

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        bias: Tensor | None,
        scale: float,
    ) -> Gradients:
        key_width, value_width = key.size(-1), value.size(-1)
        grad_out, query, key, value, out = _equally_wide(grad_out, query, key, value, out)
        grad_query, grad_key, grad_value = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out, query, key, value, out, lse, 0.0, False, attn_mask=bias, scale=scale
            )
        )
        return grad_query[..., :key_width], grad_key[..., :key_width], grad_value[..., :value_width]


class PlainKernel:
    """Plain matrix products in float32 or wider, some queries at a time: the fallback on other devices."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        key, value = _wide(key), _wide(value)
        outs, lses = [], []
        for rows in _row_chunks(query, key):
            scores = _scores(query[:, :, rows], key, bias, rows, scale)
            lse = scores.logsumexp(dim=-1)
            outs.append((scores - lse[..., None]).exp() @ value)
            lses.append(lse)
        return torch.cat(outs, dim=2).to(query.dtype), torch.cat(lses, dim=2)

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        bias: Tensor | None,
        scale: float,
    ) -> Gradients:
        wide_key, wide_value = _wide(key), _wide(value)
        grad_query = []
        grad_key, grad_value = torch.zeros_like(wide_key), torch.zeros_like(wide_value)
        for rows in _row_chunks(query, key):
            wide_grad, wide_query = _wide(grad_out[:, :, rows]), _wide(query[:, :, rows])
            weights = (_scores(wide_query, wide_key, bias, rows, scale) - lse[:, :, rows, None]).exp()
            grad_value += weights.mT @ wide_grad
            row_sum = (wide_grad * out[:, :, rows]).sum(dim=-1, keepdim=True)
            grad_scores = weights * (wide_grad @ wide_value.mT - row_sum) * scale
            grad_key += grad_scores.mT @ wide_query
            grad_query.append(grad_scores @ wide_key)
        dtype = query.dtype
        return torch.cat(grad_query, dim=2).to(dtype), grad_key.to(dtype), grad_value.to(dtype)


def kernel_for(device: torch.device) -> Kernel:
    """Return the kernel of a device."""
    return CpuKernel() if device.type == "cpu" else PlainKernel()


def _equally_wide(*tensors: Tensor) -> list[Tensor]:
    width = max(tensor.size(-1) for tensor in tensors)
    return [t if t.size(-1) == width else F.pad(t, (0, width - t.size(-1))) for t in tensors]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _row_chunks(query: Tensor, key: Tensor) -> list[slice]:
    tiles, heads, queries, _ = query.shape
    step = max(1, MAX_SCORES // (tiles * heads * key.size(2)))
    return [slice(start, start + step) for start in range(0, queries, step)]


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, rows: slice, scale: float) -> Tensor:
    scores = _wide(query) @ key.mT * scale  # [T, H, rows, k]
    if bias is None:
        return scores
    return scores + (bias if bias.size(2) == 1 else bias[:, :, rows])
