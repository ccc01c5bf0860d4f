"""What attention executors are compared with: PyTorch and TransformerEngine, given the whole mask.

Legend: S positions, L data tokens, B batch, H heads, Hkv key and value heads, D head dim.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llada_megatron.attention import Rectangle
from llada_megatron.bench.attention_cases import Case
from llada_megatron.runtime import device

DENSE, UNFUSED, TRANSFORMER_ENGINE, CAUSAL = "dense mask", "unfused", "TE unfused", "causal L"
NAMES = (DENSE, UNFUSED, TRANSFORMER_ENGINE, CAUSAL)
MAX_MASK_BYTES = 2 << 30
MAX_DENSE_POSITIONS_ON_CPU = 8192
"""Dense-mask SDPA takes minutes beyond this; then its time is extrapolated by pairs."""
MAX_SCORE_BYTES = {"cpu": 512 << 20, "cuda": 8 << 30}
"""Scores of all heads; the baselines without fusion keep several tensors of that size."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # [S, B, H, D], [S, B, Hkv, D] twice -> [S, B, H, D]


def fitting(case: Case, dtype: torch.dtype) -> list[str]:
    """Return the baselines that this machine can run on a case."""
    mask_bytes, kind = case.positions**2 * dtype.itemsize, device.device().type
    unfused_fits = case.shape.heads * mask_bytes <= MAX_SCORE_BYTES[kind]
    has_transformer_engine = kind == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    runs = {
        DENSE: mask_bytes <= MAX_MASK_BYTES
        and (kind == "cuda" or case.positions <= MAX_DENSE_POSITIONS_ON_CPU),
        UNFUSED: unfused_fits,
        TRANSFORMER_ENGINE: unfused_fits and has_transformer_engine,
        CAUSAL: True,
    }
    return [name for name in NAMES if runs[name]]


def attention(name: str, case: Case, rectangle: Rectangle, dtype: torch.dtype) -> Attention:
    """Return a baseline with its mask: the whole one, or for the yardstick that of causal length L."""
    if name == CAUSAL:
        return partial(_causal, case.length)
    shape, where = (rectangle.queries, rectangle.queries), device.device()
    if name == TRANSFORMER_ENGINE:
        hidden = torch.empty(shape, dtype=torch.bool, device=where)
        for rows in row_parts(rectangle.queries):
            hidden[rows[0] : rows[-1] + 1] = ~rectangle.mask.dense(0, rows)
        return partial(_transformer_engine, hidden[None, None])
    bias = torch.zeros(shape, dtype=dtype, device=where)  # the form in which a mask costs SDPA least
    for rows in row_parts(rectangle.queries):
        bias[rows[0] : rows[-1] + 1].masked_fill_(~rectangle.mask.dense(0, rows).to(where), float("-inf"))
    return partial(_dense if name == DENSE else _unfused, bias)


def row_parts(positions: int) -> Iterable[Tensor]:
    """Rows of a mask in parts that keep what is derived from them small."""
    return torch.arange(positions).split(max(1, (1 << 22) // positions))


def _sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    return scaled_dot_product_attention(q, k, v, enable_gqa=q.size(1) != k.size(1), **options).permute(
        2, 0, 1, 3
    )


def _dense(bias: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _sdpa(query, key, value, attn_mask=bias)


def _causal(length: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Plain causal attention of length L: a yardstick of what the kernels here can do."""
    return _sdpa(query[:length], key[:length], value[:length], is_causal=True)


def _unfused(bias: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Matrix product, softmax, matrix product; autograd keeps their S x S results for backward."""
    group = query.size(2) // key.size(2)
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key.repeat_interleave(group, 2)) * query.size(3) ** -0.5
    weights = (scores + bias).softmax(dim=-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value.repeat_interleave(group, 2))


def _transformer_engine(hidden: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """TransformerEngine with an `arbitrary` mask, which it serves unfused: the baseline of LLaDA2.0."""
    module = _transformer_engine_module(query.size(2), key.size(2), query.size(3))
    return module(query, key, value, attention_mask=hidden).unflatten(2, query.shape[2:])


@cache
def _transformer_engine_module(heads: int, kv_heads: int, head_dim: int) -> Any:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads, head_dim, num_gqa_groups=kv_heads, qkv_format="sbhd", attn_mask_type="arbitrary"
    )
