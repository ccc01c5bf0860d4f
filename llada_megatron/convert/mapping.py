"""The vocabulary of the tables: entries that say which part of a tensor becomes which.

Legend: H hidden size, D head dim, G key-value heads, Q query heads of one key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_megatron.checkpoint.shards import Part, whole


def rows(name: str, shape: tuple[int, ...], first: int, count: int) -> Part:
    """`count` rows of a matrix from row `first` on."""
    return Part(name, shape, (first, 0), (count, shape[1]))


def expert_rows(name: str, shape: tuple[int, ...], expert: int, first: int, count: int) -> Part:
    """`count` rows, from row `first` on, of one expert's matrix in a tensor [experts, rows, columns]."""
    return Part(name, shape, (expert, first, 0), (1, count, shape[2]))


@dataclass(frozen=True)
class HeadGroups:
    """Rows [all Q | all K | all V] of the fused projection against ours, grouped by key-value head."""

    heads: int
    kv_heads: int
    head_dim: int

    def group(self, separate: Tensor) -> Tensor:
        """[(heads + 2G) D, H] -> the same rows, as [its queries | key | value] of each key-value head."""
        G, D = self.kv_heads, self.head_dim
        query, key, value = separate.unflatten(0, (-1, D)).split([self.heads, G, G])
        return torch.cat([query.unflatten(0, (G, -1)), key[:, None], value[:, None]], dim=1).flatten(0, 2)

    def ungroup(self, grouped: Tensor) -> Tensor:
        """The inverse of `group`."""
        groups = grouped.unflatten(0, (self.kv_heads, -1, self.head_dim))  # [G, Q + 2, D, H]
        query, key, value = groups.split([self.heads // self.kv_heads, 1, 1], dim=1)
        return torch.cat([part.flatten(0, 2) for part in (query, key, value)])


@dataclass(frozen=True)
class Entry:
    """One part of a megatron-core tensor, and the Hugging Face parts that hold the same numbers."""

    ours: Part
    theirs: tuple[Part, ...]
    heads: HeadGroups | None = None
    """Set where the rows of Q, K and V are ordered otherwise; elsewhere the numbers are the same ones."""

    def to_ours(self, theirs: Sequence[Tensor]) -> list[Tensor]:
        """The tensor of `ours`, from those of `theirs`."""
        joined = theirs[0] if len(theirs) == 1 else torch.cat(list(theirs))
        if self.heads is not None:
            joined = self.heads.group(joined)
        return [joined.reshape(self.ours.size)]

    def to_theirs(self, ours: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of `theirs`, from that of `ours`."""
        (joined,) = ours
        if self.heads is not None:
            joined = self.heads.ungroup(joined)
        if len(self.theirs) == 1:
            return [joined.reshape(self.theirs[0].size)]
        return list(joined.split([part.size[0] for part in self.theirs]))


def same(ours: str, theirs: str, *shape: int) -> Entry:
    """A tensor that both sides hold alike."""
    return Entry(whole(ours, *shape), (whole(theirs, *shape),))


def feed_forward(ours: str, theirs: str, hidden: int, width: int) -> Iterator[Entry]:
    """SwiGLU's three matrices: fc1 holds the gate's rows, then those of `up`."""
    for first, projection in ((0, "gate_proj"), (width, "up_proj")):
        source = whole(f"{theirs}.{projection}.weight", width, hidden)
        yield Entry(rows(f"{ours}.linear_fc1.weight", (2 * width, hidden), first, width), (source,))
    yield same(f"{ours}.linear_fc2.weight", f"{theirs}.down_proj.weight", hidden, width)
