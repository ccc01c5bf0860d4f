"""A rectangle of the mask as intervals of visible keys per query: the form that GPU kernels take.

Legend: Q queries, K keys, B batch, F endpoints (odd), T tokens of a tile, L data tokens per sequence.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llada_megatron.attention.mask import Rectangle
from llada_megatron.runtime.device import sent

Endpoints = npt.NDArray[np.int32]  # [B, F, Q]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (sample, head, query, key) -> visible

_kept: WeakKeyDictionary[Rectangle, Tensor] = WeakKeyDictionary()


def endpoints(rectangle: Rectangle) -> Endpoints:
    """Return int32 [B, F, Q]: a query sees the keys [0, F0), [F1, F2), [F3, F4) ...

    The endpoints of a row never fall and lie in [0, K]. F is 5 with a clean copy (own group, past), else 3,
    or 1 where every document starts at the first key.
    """
    if rectangle.mask.clean_copy:
        own, past, clean = rectangle.own_block, rectangle.past, rectangle.past_and_block
        halves = [
            [own.start, own.stop, past.start, past.stop],
            [clean.start, clean.stop, clean.stop, clean.stop],
        ]
    else:
        seen = rectangle.past_and_block if rectangle.mask.causal else rectangle.document
        halves = [[seen.start, seen.stop] if seen.start.any() else [seen.stop]]
    F = len(halves[0]) | 1
    ends = np.zeros((rectangle.batch, F, rectangle.queries), dtype=np.int32)
    for half, rows in zip(halves, np.split(ends, len(halves), axis=2), strict=True):
        for place, edges in enumerate(half, F - len(half)):
            rows[:, place] = edges
    return ends


def keep_endpoints(rectangle: Rectangle, endpoints_BFQ: Tensor) -> None:
    """Have `endpoints_on` find them where they lie, as long as the rectangle lives."""
    _kept[rectangle] = endpoints_BFQ


def endpoints_on(rectangle: Rectangle, device: torch.device) -> Tensor:
    """`endpoints` on a device: what came with the batch, or a copy, for which the host does not wait."""
    kept = _kept.get(rectangle)
    if kept is not None and kept.device == device:
        return kept
    return sent(torch.from_numpy(endpoints(rectangle)), device)


def tile_occupancy(
    endpoints_BFQ: Endpoints, keys: int, tile: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return two bool [B, Q/T, K/T] (rounded up): tiles with a visible pair, tiles with no hidden one.

    Takes O(B Q F) steps and the memory of its results, never Q x K. A tile that sticks out over the last
    query or key counts as one with hidden pairs.
    """
    stop = endpoints_BFQ[:, 0::2]
    start = np.concatenate([np.zeros_like(stop[:, :1]), endpoints_BFQ[:, 1::2]], axis=1)
    touched_stop = np.where(start < stop, -(-stop // tile), start // tile)
    touched = _rows_over_tiles(start // tile, touched_stop, keys, tile)
    whole_start = -(-start // tile)
    whole = _rows_over_tiles(whole_start, np.maximum(stop // tile, whole_start), keys, tile)
    return touched > 0, whole == tile


def _rows_over_tiles(start: Endpoints, stop: Endpoints, keys: int, tile: int) -> npt.NDArray[np.int64]:
    """How many rows of each query tile have an interval of key tiles [start, stop) over each key tile."""
    batch, _, queries = start.shape
    changes = np.zeros((batch, -(-queries // tile), -(-keys // tile) + 2), dtype=np.int64)
    sample = np.arange(batch)[:, None, None]
    query_tile = np.arange(queries) // tile
    np.add.at(changes, (sample, query_tile, start), 1)
    np.add.at(changes, (sample, query_tile, stop), -1)
    return changes.cumsum(axis=2)[:, :, :-2]


def mask_mod(endpoints_BFQ: Tensor) -> MaskMod:
    """Return FlexAttention's mask function for endpoints on the queries' device."""

    def visible(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key < endpoints_BFQ[sample, 0, query]
        for start in range(1, endpoints_BFQ.size(1), 2):
            after_start = key >= endpoints_BFQ[sample, start, query]
            seen = seen | (after_start & (key < endpoints_BFQ[sample, start + 1, query]))
        return seen

    return visible
