"""Which keys exist for my queries: what a layer asks before it attends.

Legend: S rows of a rank, K keys of a call, B batch, Hkv key and value heads, D key width, Dv value width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llada_megatron.attention.mask import BlockDiffusionMask, Rectangle


class Keys(Protocol):
    """`ContextShard`: a rank's part of a batch, whose keys lie on several ranks. `KeyRange`: a cache's."""

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


class KeyRange:
    """Rows [start, L) of a sequence against all its keys [0, L), of which the earlier ones were kept.

    `mask` is causal over blocks and spans the L tokens; `kept` holds key [start, B, Hkv, D] and value
    [start, B, Hkv, Dv] of each layer, as `of` returned them, and is not asked where start = 0. Rows may be
    kept once their block is complete: an earlier row never sees a later block.
    """

    def __init__(
        self, mask: BlockDiffusionMask, start: int, kept: Mapping[int, tuple[Tensor, Tensor]]
    ) -> None:
        if not mask.causal or not 0 <= start < mask.length:
            raise ValueError(
                f"KeyRange needs a causal mask and a start from 0 to {mask.length - 1}, got {start}"
                f" and causal={mask.causal}"
            )
        self.mask, self.start, self.kept = mask, start, kept

    @cached_property
    def rectangle(self) -> Rectangle:
        """The last rows against all keys."""
        tokens = np.tile(np.arange(self.start, self.mask.length), (self.mask.batch, 1))
        return Rectangle(self.mask, tokens, tokens[:, :0])

    def of(self, key: Tensor, value: Tensor, layer: int, group: Any) -> tuple[Tensor, Tensor]:
        """The kept keys and values, then these."""
        if self.start == 0:
            return key, value
        kept_key, kept_value = self.kept[layer]
        return torch.cat([kept_key, key]), torch.cat([kept_value, value])

    def to(self, device: torch.device) -> KeyRange:
        """This object: it has no tensors of its own."""
        return self
