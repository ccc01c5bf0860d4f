"""Which keys exist for my queries: what a layer asks before it attends.

Legend: S rows of a rank, K keys of a call, B batch, Hkv key and value heads, D key width, Dv value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from llada_megatron.attention.mask import BlockDiffusionMask, KeySpans, Rectangle
from llada_megatron.config.schema import BlockGrid


class Keys(Protocol):
    """`ContextShard`: a rank's part of a batch, whose keys lie on several ranks. `PooledKeys`: a cache's."""

    @property
    def mask(self) -> BlockDiffusionMask:
        """Who sees whom."""

    @property
    def rectangle(self) -> Rectangle:
        """The rows at hand against the keys that `of` returns; one object, executors keep plans with it."""

    def of(self, key: Tensor, value: Tensor, layer: int, group: Any) -> tuple[Tensor, Tensor]:
        """All keys [K, B, Hkv, D] and values [K, B, Hkv, Dv] from those of the rows at hand, [S, B, Hkv, *].

        `layer` counts from 1 over all pipeline stages; `group` is the context-parallel process group.
        """

    def to(self, device: torch.device) -> Keys:
        """The same keys with their index tensors on `device`."""


class KeyPool:
    """Keys and values of every layer at numbered places, which outlive the forward that wrote them.

    A layer's tensors, key [places, Hkv, D] and value [places, Hkv, Dv], are made when it first has something
    to keep: in the dtype of its rows, and zero, so that whatever nobody wrote is finite.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of_layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's own key and value tensors, to hold rows such as [S, B, Hkv, D] and [S, B, Hkv, Dv]."""
        if layer not in self._layers:
            self._layers[layer] = tuple(rows.new_zeros(self.places, *rows.shape[2:]) for rows in (key, value))
        return self._layers[layer]

    def grow(self, places: int) -> None:
        """Room for so many; what is kept stays where it is."""
        self.places = places
        for layer, pair in self._layers.items():  # one layer is there twice meanwhile
            more = [rows.new_zeros(places - len(rows), *rows.shape[1:]) for rows in pair]
            self._layers[layer] = tuple(torch.cat(both) for both in zip(pair, more, strict=True))

    @property
    def bytes(self) -> int:
        """What the tensors take on this rank."""
        return sum(tensor.nbytes for pair in self._layers.values() for tensor in pair)


class PoolPart(NamedTuple):
    """Rows of one sequence, and where its keys are kept.

    A shadow is a second row for each token of a block, at the same position, which sees everything that the
    block sees and the other rows of the shadow, but not the token itself: it says what the model makes of
    that place without it. No row of the sequence sees a shadow.
    """

    rows: int | slice
    """The sequence's own: a slice of its n tokens, or the number of the first one where they are all from
    there on. Or the tokens [start, stop) whose shadow they are."""
    places: np.ndarray
    """int64 [n], the place in the pool of each token. What is no row is kept."""
    shadow: np.ndarray | None = None
    """int64 [stop - start], the places of the rows' own keys where they are a shadow."""


class PooledKeys:
    """Rows of several sequences, against all keys of each: those kept in a pool, and their own.

    The sequences lie one after the other as the documents of one sample, so that rows of any number, blocks
    at any step and prompts of any length make one forward without padding. `of` writes the keys of the rows
    to their places: they are kept from then on, and a later forward that finds other tokens there writes them
    anew.

    Attributes:
        parts: whose rows there are, in order.
        places: int64 [K], of each key in the pool.
        block_size: a row sees its sequence up to the end of its block; blocks count from the first token.
            One that is as long as the sequences lets every row see all of its own.
        positions: int64 [S], of each row in its sequence.
    """

    def __init__(
        self, pool: KeyPool, parts: Sequence[PoolPart | tuple[int | slice, np.ndarray]], block_size: int
    ) -> None:
        laid = [_laid(PoolPart(*part)) for part in parts]
        begins = np.cumsum([0, *(len(each.places) for each in laid)])
        rows = np.concatenate([begin + each.rows for begin, each in zip(begins, laid, strict=False)])
        edges = [begin + each.edges for begin, each in zip(begins, laid, strict=False)]
        self.pool = pool
        self.places = places = np.concatenate([each.places for each in laid])
        self.positions = np.concatenate([each.positions for each in laid])
        self.mask = BlockDiffusionMask(
            [torch.from_numpy(np.unique(np.append(np.concatenate(edges), begins[-1])))],
            min(block_size, len(places)),
            block_grid=BlockGrid.document,
            clean_copy=False,
            causal=True,
        )
        self.rectangle = Rectangle(self.mask, rows[None], rows[None, :0], few_rows=True)
        before, after = np.repeat([each.sight for each in laid], [len(each.rows) for each in laid], axis=0).T
        if after.any():
            seen, is_shadow = self.rectangle.past_and_block, after > 0
            start = np.where(is_shadow, rows - before, seen.start)
            window = KeySpans(start, np.where(is_shadow, rows + after, seen.stop))
            self.rectangle = replace(self.rectangle, window=window)
        self._row_places = torch.from_numpy(places[rows])
        self._key_places = torch.from_numpy(places)
        # The keys of one sequence mostly lie one after the other: then they are read where they are.
        self._in_order = slice(int(places[0]), int(places[0]) + len(places))
        self._are_in_order = bool((np.diff(places) == 1).all())

    def within(self, pool: KeyPool) -> PooledKeys:
        """The same rows and places in another pool."""
        found = copy(self)
        found.pool = pool
        return found

    def of(self, key: Tensor, value: Tensor, layer: int, group: Any) -> tuple[Tensor, Tensor]:
        """All keys and values of the sequences, those of the rows at hand among them."""
        found = []
        for kept, rows in zip(self.pool.of_layer(layer, key, value), (key, value), strict=True):
            kept.index_copy_(0, self._row_places, rows[:, 0])
            found.append(
                kept[self._in_order] if self._are_in_order else kept.index_select(0, self._key_places)
            )
        return found[0][:, None], found[1][:, None]

    def to(self, device: torch.device) -> PooledKeys:
        """These keys with their index tensors on `device`."""
        self._row_places, self._key_places = self._row_places.to(device), self._key_places.to(device)
        return self


@dataclass(frozen=True)
class _Laid:
    """The keys of a part as a document, or as several whose rows are a block of the mask each."""

    places: np.ndarray
    """int64 [K], of the keys in the pool."""
    rows: np.ndarray
    """int64 [S], which of the keys are those of the rows."""
    positions: np.ndarray
    """int64 [S]"""
    edges: np.ndarray
    """int64, the keys that a document begins with."""
    sight: tuple[int, int] = (0, 0)
    """How many keys before its own and from it on a row of a shadow sees."""


def _laid(part: PoolPart) -> _Laid:
    """A shadow's keys are laid in an order in which each row sees neighbours alone, all but its token:

    the block's but the first | the sequence's others | the shadow's | the block's but the last
    """
    places, n = part.places, len(part.places)
    positions = np.arange(n)[part.rows if isinstance(part.rows, slice) else slice(part.rows, None)]
    if part.shadow is None:
        return _Laid(places, positions, positions, np.zeros(1, np.int64))
    m, start, stop = len(positions), int(positions[0]), int(positions[-1]) + 1
    others = places[start + 1 : stop], places[:start], places[stop:]
    return _Laid(
        np.concatenate([*others, part.shadow, places[start : stop - 1]]),
        n - 1 + np.arange(m),
        positions,
        np.array([0, n - 1, n - 1 + m]),
        sight=(n - 1, m),
    )
