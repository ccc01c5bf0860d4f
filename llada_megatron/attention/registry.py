"""The one entry to block-diffusion attention: checks the shapes and picks an executor.

Legend: S sequence, Q queries, K keys, B batch, H heads, D head dim, Hkv key and value heads, Dv value width.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from llada_megatron.attention import cudnn_flex, cudnn_graph, flex_torch, varlen
from llada_megatron.attention.mask import BlockDiffusionMask, Rectangle
from llada_megatron.attention.portable import portable_attention
from llada_megatron.attention.reference import reference_attention
from llada_megatron.config.errors import BadInput

Executor = Callable[[Tensor, Tensor, Tensor, Rectangle, float], Tensor]
MissingRequirement = Callable[[torch.device, torch.dtype, int, bool], str | None]

_EXECUTORS: dict[str, Executor] = {
    "reference": reference_attention,
    "portable": portable_attention,
    "flex_torch": flex_torch.flex_torch_attention,
    "cudnn_graph": cudnn_graph.cudnn_graph_attention,
    "cudnn_flex": cudnn_flex.cudnn_flex_attention,
    "varlen": varlen.varlen_attention,
}
_MISSING_REQUIREMENT: dict[str, MissingRequirement] = {  # the others serve every device, dtype and head_dim
    "flex_torch": flex_torch.missing_requirement,
    "cudnn_graph": cudnn_graph.missing_requirement,
    "cudnn_flex": cudnn_flex.missing_requirement,
    "varlen": varlen.missing_requirement,
}
_ANY_VALUE_WIDTH = ("reference", "portable", "flex_torch")
# By the pairs that each computes and how, not by measured times.
_FASTEST_FIRST = ("cudnn_flex", "flex_torch", "cudnn_graph", "portable")
# A forward of decoding mostly has a rectangle of its own. For each cudnn_flex reads a header back from the
# device, flex_torch makes tables and compiles for some shapes, cudnn_graph compiles for every shape.
_FASTEST_FIRST_OF_FEW_ROWS = ("varlen", "portable")


def executor_names(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Return the executors that can train with such tensors."""
    return [name for name in _EXECUTORS if _missing(name, device, dtype, head_dim, True) is None]


@cache
def select_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    needs_backward: bool = True,
    value_dim: int | None = None,
    few_rows: bool = False,
) -> tuple[Executor, str]:
    """Return the executor for a `model.attention_backend` setting and one line that says why.

    "auto" takes the fastest one that can also train, so that training and evaluation use the same; for
    `few_rows` without a backward, as in decoding, the fastest one that does not wait or compile for a
    rectangle which it has not seen. The line gives the reason against each faster one. Raises BadInput for a
    name that is neither "auto" nor an executor, and for an executor that cannot serve such tensors: nothing
    falls back to another one. Values are `value_dim` wide, by default as wide as keys.
    """
    if name == "auto":
        is_decoding = few_rows and not needs_backward
        order = _FASTEST_FIRST_OF_FEW_ROWS if is_decoding else _FASTEST_FIRST
        return _fastest(order, device, dtype, head_dim, not is_decoding, value_dim)
    if name not in _EXECUTORS:
        choices = ", ".join(["auto", *_EXECUTORS])
        raise BadInput(f"model.attention_backend must be one of {choices}, got {name!r}")
    missing = _missing(name, device, dtype, head_dim, needs_backward, value_dim)
    if missing:
        raise BadInput(f"model.attention_backend={name} {missing}; auto takes one that can serve")
    return _EXECUTORS[name], f"{name}: set by model.attention_backend"


def _fastest(
    order: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    needs_backward: bool,
    value_dim: int | None,
) -> tuple[Executor, str]:
    passed_over: list[str] = []
    for name in order:
        missing = _missing(name, device, dtype, head_dim, needs_backward, value_dim)
        if missing is None:
            reasons = "".join(f"; {reason}" for reason in passed_over)
            return _EXECUTORS[name], f"{name}: the fastest that can serve here{reasons}"
        passed_over.append(f"{name} {missing}")
    raise AssertionError("the last executor serves everything")


def _missing(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    needs_backward: bool,
    value_dim: int | None = None,
) -> str | None:
    if value_dim not in (None, head_dim) and name not in _ANY_VALUE_WIDTH:
        return f"serves values as wide as keys, not {value_dim} wide for keys of {head_dim}"
    requirement = _MISSING_REQUIREMENT.get(name)
    return requirement(device, dtype, head_dim, needs_backward) if requirement else None


def block_diffusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockDiffusionMask | Rectangle,
    backend: str | Executor = "auto",
    softmax_scale: float | None = None,
) -> Tensor:
    """Return attention under `mask` as [Q, B, H, Dv] in the query's dtype.

    query [Q, B, H, D]; key [K, B, Hkv, D]; value [K, B, Hkv, Dv], noisy half first where the mask has a clean
    copy; Q = K = S for a whole mask. Groups of H / Hkv neighbouring query heads share a key and value head.
    `backend` is a setting or the executor itself. `softmax_scale` defaults to 1 / sqrt(D). Raises ValueError
    for shapes that do not fit the mask or each other, and BadInput for an unknown backend or one that cannot
    serve this device, dtype or these widths.
    """
    rectangle = mask.whole() if isinstance(mask, BlockDiffusionMask) else mask
    _check_shapes(query, key, value, rectangle)
    scale = query.size(-1) ** -0.5 if softmax_scale is None else softmax_scale
    if callable(backend):
        return backend(query, key, value, rectangle, scale)
    needs_backward = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    tensors = query.device, query.dtype, query.size(3), needs_backward, value.size(3)
    executor, _ = select_backend(backend, *tensors, rectangle.few_rows)
    return executor(query, key, value, rectangle, scale)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, rectangle: Rectangle) -> None:
    queries, keys, batch = rectangle.queries, rectangle.keys, rectangle.batch
    if query.dim() != 4 or query.shape[:2] != (queries, batch):
        raise ValueError(
            f"query must be [{queries}, {batch}, heads, head_dim] for this mask, got {tuple(query.shape)}"
        )
    if key.dim() != 4 or key.shape[:2] != (keys, batch) or key.size(3) != query.size(3):
        raise ValueError(
            f"key must be [{keys}, {batch}, kv_heads, {query.size(3)}] for this mask and query, "
            f"got {tuple(key.shape)}"
        )
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        expected = ", ".join(map(str, key.shape[:3]))
        raise ValueError(f"value must be [{expected}, value_dim] for this key, got {tuple(value.shape)}")
    heads, kv_heads = query.size(2), key.size(2)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the {heads} query heads must be a multiple of the {kv_heads} key and value heads")
