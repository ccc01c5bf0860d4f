"""Block-diffusion attention through torch's FlexAttention: Triton kernels on CUDA, inference only on a CPU.

Legend: Q queries, K keys, B batch, H heads, D key width, Dv value width, Hkv key and value heads, F
endpoints.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from llada_megatron.attention.intervals import endpoints, endpoints_on, mask_mod, tile_occupancy
from llada_megatron.attention.mask import Rectangle
from llada_megatron.runtime.device import sent

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TILE = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALLEST_HEAD_DIM = 16
GRAPHS = 64
"""Of a process at most: one for each number of endpoints and of samples, for most shapes, with a gradient and
without. torch's own limit is 8, past which it would compute every score; past this one it raises."""


_block_masks: WeakKeyDictionary[Rectangle, dict[torch.device, "BlockMask"]] = WeakKeyDictionary()


def missing_requirement(
    device: torch.device, dtype: torch.dtype, head_dim: int, needs_backward: bool
) -> str | None:
    """Return what `flex_torch_attention` lacks to serve such tensors, or None when it can."""
    if device.type != "cuda":
        where = f"a {device.type.upper()}"
        return f"has no backward on {where}, where it serves inference only" if needs_backward else None
    if dtype not in DTYPES:
        return f"serves bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if head_dim < SMALLEST_HEAD_DIM:
        return f"serves a head_dim of {SMALLEST_HEAD_DIM} or more, not {head_dim}"
    return None


def flex_torch_attention(
    query: Tensor, key: Tensor, value: Tensor, rectangle: Rectangle, softmax_scale: float
) -> Tensor:
    """Return the attention output [Q, B, H, Dv].

    query [Q, B, H, D]; key [K, B, Hkv, D]; value [K, B, Hkv, Dv]. On a CPU it is the uncompiled
    form, which holds Q x K scores and has no backward.
    """
    block_mask = _block_mask_of(rectangle, query.device)
    output = _kernel(query.device.type)(
        *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),  # [B, H, S, D]
        block_mask=block_mask,
        scale=softmax_scale,
        enable_gqa=query.size(2) != key.size(2),
    )
    return output.permute(2, 0, 1, 3)


@cache
def _kernel(device_type: str) -> Callable[..., Tensor]:
    # Imported here, since the import is what reads the setting of megatron-core's CPU seam.
    from torch._dynamo import config as tracing
    from torch.nn.attention.flex_attention import flex_attention

    if device_type == "cuda":
        tracing.recompile_limit = max(tracing.recompile_limit, GRAPHS)  # an argument of torch 2.14's compile
        return torch.compile(flex_attention, fullgraph=True)
    # Uncompiled, it still traces itself; the seam turns tracing off for the process.
    return tracing.patch(disable=False)(flex_attention)  # type: ignore[no-any-return]


def _block_mask_of(rectangle: Rectangle, device: torch.device) -> "BlockMask":
    block_masks = _block_masks.setdefault(rectangle, {})
    if device not in block_masks:
        block_masks[device] = _block_mask(rectangle, device)
    return block_masks[device]


def _block_mask(rectangle: Rectangle, device: torch.device) -> "BlockMask":
    """Torch's own create_block_mask evaluates all Q x K pairs; the endpoints give the tiles directly."""
    from torch.nn.attention.flex_attention import BlockMask

    ends = endpoints(rectangle)
    visible, whole = tile_occupancy(ends, rectangle.keys, TILE)
    partial_count, partial_tiles = _listed(visible & ~whole, device)
    whole_count, whole_tiles = _listed(whole, device)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_tiles,
        whole_count,
        whole_tiles,
        BLOCK_SIZE=TILE,
        mask_mod=mask_mod(endpoints_on(rectangle, device)),
        seq_lengths=(rectangle.queries, rectangle.keys),
    )


def _listed(tiles: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per row of tiles, bool [B, q, k]: how many are set, int32 [B, 1, q], and their columns first."""
    columns = np.argsort(~tiles, axis=2, kind="stable").astype(np.int32)
    count = tiles.sum(axis=2, dtype=np.int32)
    count_BQ, columns_BQK = (sent(torch.from_numpy(each), device) for each in (count, columns))
    return count_BQ[:, None], columns_BQK[:, None]
