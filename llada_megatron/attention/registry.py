"""The one entry to block-diffusion attention: checks the shapes and picks an executor.

Legend: S sequence, B batch, H heads, D head dim, Hkv key and value heads.
"""

from collections.abc import Callable

from torch import Tensor

from llada_megatron.attention.composed import composed_attention
from llada_megatron.attention.mask import BlockDiffusionMask
from llada_megatron.attention.reference import reference_attention

Executor = Callable[[Tensor, Tensor, Tensor, BlockDiffusionMask, float], Tensor]

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
    mask: BlockDiffusionMask,
    backend: str = "auto",
    softmax_scale: float | None = None,
) -> Tensor:
    """Return attention under `mask` as [S, B, H, D] in the query's dtype.

    query [S, B, H, D]; key, value [S, B, Hkv, D], noisy half first where the mask has a clean copy. Groups of
    H / Hkv neighbouring query heads share a key and value head. `softmax_scale` defaults to 1 / sqrt(D).
    Raises ValueError for shapes that do not fit the mask or each other and for an unknown backend.
    """
    _check_shapes(query, key, value, mask)
    executor, _ = select_backend(backend)
    return executor(
        query, key, value, mask, query.size(-1) ** -0.5 if softmax_scale is None else softmax_scale
    )


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, mask: BlockDiffusionMask) -> None:
    if query.dim() != 4 or query.shape[:2] != (mask.total, mask.batch):
        raise ValueError(
            f"query must be [{mask.total}, {mask.batch}, heads, head_dim] for this mask, "
            f"got {tuple(query.shape)}"
        )
    if key.dim() != 4 or key.shape[:2] != query.shape[:2] or key.size(3) != query.size(3):
        raise ValueError(
            f"key must be [{mask.total}, {mask.batch}, kv_heads, {query.size(3)}] for this mask and query, "
            f"got {tuple(key.shape)}"
        )
    if value.shape != key.shape:
        raise ValueError(f"value must have the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}")
    heads, kv_heads = query.size(2), key.size(2)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the {heads} query heads must be a multiple of the {kv_heads} key and value heads")
