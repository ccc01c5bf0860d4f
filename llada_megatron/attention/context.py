"""Context parallelism for `[x_t ; x_0]`: both halves are split by the same tokens, and clean keys travel.

A noisy key is visible inside its own noise group only, which mostly is a block. As long as a group lies on
one rank, a rank therefore needs its own noisy keys and every clean key: L (R-1)/R keys received in forward,
and as many key gradients in backward, half of what gathering `[x_t ; x_0]` moves. Of groups that span ranks
those noisy keys travel too that other ranks see (a halo).
Masks with one half (MDLM, autoregressive) gather all of it.

Legend: L data tokens per sequence, R ranks, n = L/R tokens of a rank, B batch, K keys of a call, T halo keys
that each rank sends, padded to the largest count; Hkv key and value heads, D key width, Dv value width.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llada_megatron.attention.intervals import endpoints, keep_endpoints
from llada_megatron.attention.mask import BlockDiffusionMask, Rectangle
from llada_megatron.parallel.context import deal_tokens
from llada_megatron.runtime.device import sent


class ContextShard:
    """What one rank of a context-parallel group holds of a micro-batch, and how it gets its `Keys`.

    Every rank works out the same deal from the mask alone. Raises BadInput when L is not a multiple of
    `ranks`. With one rank the shard is the whole mask and nothing travels.
    """

    def __init__(self, mask: BlockDiffusionMask, rank: int = 0, ranks: int = 1) -> None:
        self.mask, self.rank, self.ranks = mask, rank, ranks

    @cached_property
    def owner(self) -> np.ndarray:
        """The rank that holds each token, int64 [B, L]."""
        mask = self.mask
        if self.ranks == 1:
            return np.zeros((mask.batch, mask.length), dtype=np.int64)
        # Without a clean copy all keys travel anyway, so cutting a block costs nothing.
        block_size = mask.block_size if mask.clean_copy else 1
        deals = zip(mask.pairs_per_token, mask.group_start, strict=True)
        return np.stack([deal_tokens(work, starts, block_size, self.ranks) for work, starts in deals])

    @cached_property
    def tokens(self) -> np.ndarray:
        """This rank's tokens in rising order, int64 [B, n]."""
        return self._tokens_BRn[:, self.rank]

    @property
    def rows(self) -> np.ndarray:
        """Positions in [0, S) of this rank's model rows, int64 [B, S/R]: noisy rows, then clean ones."""
        halves = [0, self.mask.length] if self.mask.clean_copy else [0]
        return np.concatenate([self.tokens + half for half in halves], axis=1)

    @cached_property
    def row_of_token(self) -> np.ndarray:
        """The row, in its owner's first half, that holds each token, int64 [B, L]."""
        row = np.empty_like(self.owner)
        rows_of_ranks = np.tile(np.arange(self.tokens.shape[1]), self.ranks)
        np.put_along_axis(row, self._tokens_BRn.reshape(row.shape), rows_of_ranks[None], axis=1)
        return row

    @cached_property
    def rectangle(self) -> Rectangle:
        """This rank's queries against the keys that `of` returns."""
        if self.ranks == 1:
            return self.mask.whole()
        return Rectangle(self.mask, self.tokens, self._noisy_keys)

    @property
    def own_rows(self) -> int:
        """Rows, flattened, whose keys stay here: the noisy ones, in front of those that travel."""
        return self.tokens.size if self.mask.clean_copy else 0

    @cached_property
    def halo_rows(self) -> Tensor:
        """Noisy rows, flattened as row * B + sample, that this rank sends; int64 [T]."""
        rows = self._halo_of_rank[self.rank]
        return torch.from_numpy(np.pad(rows, (0, self._halo_size - len(rows))))

    @cached_property
    def key_order(self) -> Tensor:
        """Where each key of the rectangle lies: own noisy rows first, then what was received; int64 [K B]."""
        rows = self.tokens.size  # of one half, flattened
        received = self.own_rows + self.owner * (rows + self._halo_size)
        keys = received + self._flat_row
        if self.mask.clean_copy:
            travelled = received + rows + self._halo_slot
            noisy_BL = np.where(self.owner == self.rank, self._flat_row, travelled)
            # Nobody looks at padding: any key will do.
            padded = np.minimum(self._noisy_keys, self.mask.length - 1)
            keys = np.concatenate([np.take_along_axis(noisy_BL, padded, axis=1), keys], axis=1)
        return torch.from_numpy(np.ascontiguousarray(keys.T).reshape(-1))

    def prepare(self) -> None:
        """Make on the host what a device will read, so that `map` can take it there."""
        if self.ranks > 1:
            _ = self.halo_rows, self.key_order
        _ = self.endpoints

    @cached_property
    def endpoints(self) -> Tensor:
        """Those of the rectangle (attention/intervals.py), int32 [B, F, Q]."""
        return torch.from_numpy(endpoints(self.rectangle))

    def map(self, function: Callable[[Tensor], Tensor]) -> ContextShard:
        """The same shard with function(tensor) in the place of each tensor that it has made so far.

        Both have one rectangle, whose executor finds the endpoints where they then lie.
        """
        _ = self.rectangle
        mapped = copy(self)
        made = {name: each for name, each in vars(self).items() if isinstance(each, Tensor)}
        vars(mapped).update({name: function(each) for name, each in made.items()})
        if "endpoints" in made:
            keep_endpoints(self.rectangle, mapped.endpoints)
        return mapped

    def to(self, device: torch.device) -> ContextShard:
        """The same shard with its tensors on `device`, which on a CPU are made when they are needed."""
        if device.type == "cpu":
            return self
        self.prepare()
        return self.map(partial(sent, device=device))

    def of(self, key: Tensor, value: Tensor, layer: int, group: Any) -> tuple[Tensor, Tensor]:
        """Keys [K, B, Hkv, D] and values [K, B, Hkv, Dv] from this rank's [S/R, B, Hkv, *].

        One all-gather in forward and one reduce-scatter of the gradients in backward, keys and values
        together. `group` is the context-parallel process group; unused with one rank.
        """
        if self.ranks == 1:
            return key, value
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        rows = torch.cat([key, value], dim=-1).flatten(0, 1)  # [S/R * B, Hkv, D + Dv]
        own, travelling = rows[: self.own_rows], rows[self.own_rows :]
        if len(self.halo_rows):
            travelling = torch.cat([travelling, own.index_select(0, self.halo_rows)])
        received = gather_from_sequence_parallel_region(travelling, group=group)
        pool = torch.cat([own, received]) if len(own) else received
        chosen = pool.index_select(0, self.key_order).unflatten(0, (-1, self.mask.batch))
        keys, values = chosen.split([key.size(-1), value.size(-1)], dim=-1)
        return keys, values

    @cached_property
    def _tokens_BRn(self) -> np.ndarray:
        by_rank = np.argsort(self.owner, axis=1, kind="stable")
        return by_rank.reshape(self.mask.batch, self.ranks, -1)

    @cached_property
    def _flat_row(self) -> np.ndarray:
        """Each token's row, flattened as row * B + sample in its owner's first half; int64 [B, L]."""
        return self.row_of_token * self.mask.batch + np.arange(self.mask.batch)[:, None]

    @cached_property
    def _noisy_keys(self) -> np.ndarray:
        """Tokens of every group that this rank has a token of, int64 [B, Kn], padded with L."""
        if not self.mask.clean_copy:
            return self.tokens[:, :0]
        group_start = self.mask.group_start
        own_groups = np.take_along_axis(group_start, self.tokens, axis=1)
        needed = [
            np.flatnonzero(np.isin(starts, own)) for starts, own in zip(group_start, own_groups, strict=True)
        ]
        size = max(len(tokens) for tokens in needed)
        return np.stack([np.pad(t, (0, size - len(t)), constant_values=self.mask.length) for t in needed])

    @cached_property
    def spans_ranks(self) -> np.ndarray:
        """Whether each token's block, or its group behind it, has tokens of other ranks, bool [B, L].

        They see the token's noisy key; those of the group before it do not.
        """
        if not self.mask.clean_copy:
            return np.zeros(self.owner.shape, dtype=bool)
        same = np.ones(self.owner.shape, dtype=bool)
        same[:, 1:] = (self.owner[:, 1:] == self.owner[:, :-1]) | (np.diff(self.mask.group_start) != 0)
        changes_before = np.cumsum(~same, axis=1)
        first = np.take_along_axis(changes_before, self.mask.block_start, axis=1)
        last = np.take_along_axis(changes_before, self.mask.group_stop - 1, axis=1)
        return first != last

    @cached_property
    def _halo_of_rank(self) -> list[np.ndarray]:
        """For each rank the noisy rows that it sends, flattened and rising."""
        halos = (self.spans_ranks & (self.owner == rank) for rank in range(self.ranks))
        return [np.sort(self._flat_row[halo]) for halo in halos]

    @cached_property
    def _halo_size(self) -> int:
        return max(len(rows) for rows in self._halo_of_rank)

    @cached_property
    def _halo_slot(self) -> np.ndarray:
        """Place of each token's noisy key among those that its owner sends, int64 [B, L]."""
        slot = np.zeros_like(self.owner)
        for rank, travelling in enumerate(self._halo_of_rank):
            mine = self.spans_ranks & (self.owner == rank)
            slot[mine] = np.searchsorted(travelling, self._flat_row[mine])
        return slot
