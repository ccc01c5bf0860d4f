"""The one entry to block-diffusion attention: checks the shapes and picks an executor.

Legend: S sequence, Q queries, K keys, B batch, H heads, D head dim, Hkv key and value heads.
"""

from collections.abc import Callable

from torch import Tensor

from llada_megatron.attention.composed import composed_attention
from llada_megatron.attention.mask import BlockDiffusionMask, Rectangle
from llada_megatron.attention.reference import reference_attention

Executor = Callable[[Tensor, Tensor, Tensor, Rectangle, float], Tensor]

_EXECUTORS: dict[str, Executor] = {"reference": reference_attention, "composed": composed_attention}


def select_backend(name: str) -> tuple[Executor, str]:
    """Return the executor for a `model.attention_backend` setting and one line that says why.

    Raises ValueError for a name that is neither "auto" nor an executor.
    """
    if name == "auto":
        return _EXECUTORS["composed"], "composed: any device and dtype, without S x S memory"
    if name not in _EXECUTORS:
        choices = ", ".join(["auto", *_EXECUTORS])
        raise ValueError(f"model.attention_backend must be one of {choices}, got {name!r}")
    return _EXECUTORS[name], f"{name}: set by model.attention_backend"


def block_diffusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockDiffusionMask | Rectangle,
    backend: str = "auto",
    softmax_scale: float | None = None,
) -> Tensor:
    """Return attention under `mask` as [Q, B, H, D] in the query's dtype.

    query [Q, B, H, D]; key, value [K, B, Hkv, D], noisy half first where the mask has a clean copy; Q = K = S
    for a whole mask. Groups of H / Hkv neighbouring query heads share a key and value head. `softmax_scale`
    defaults to 1 / sqrt(D). Raises ValueError for shapes that do not fit the mask or each other and for an
    unknown backend.
    """
    rectangle = mask.whole() if isinstance(mask, BlockDiffusionMask) else mask
    _check_shapes(query, key, value, rectangle)
    executor, _ = select_backend(backend)
    scale = query.size(-1) ** -0.5 if softmax_scale is None else softmax_scale
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
    if value.shape != key.shape:
        raise ValueError(f"value must have the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}")
    heads, kv_heads = query.size(2), key.size(2)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the {heads} query heads must be a multiple of the {kv_heads} key and value heads")
