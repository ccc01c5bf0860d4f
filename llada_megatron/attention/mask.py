"""The block-diffusion mask: the one definition of who sees whom in `[x_t ; x_0]`.

Legend: S positions the attention sees (2L or L), B batch, L data tokens per sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import BlockGrid

PerToken = npt.NDArray[np.int64]  # [B, L]


@dataclass(frozen=True, eq=False)
class BlockDiffusionMask:
    """Visibility of keys for a micro-batch of packed sequences (LLaDA2.0, arXiv 2512.15745, eq. 3 and 4).

    With b(i) the block of token i, and only within one document:

        noisy -> noisy   b(query) == b(key)
        noisy -> clean   b(query) >  b(key)
        clean -> clean   b(query) >= b(key)
        clean -> noisy   never

    Without a clean copy every key of the same document is visible, or, with `causal`, b(query) >= b(key).
    With noise groups, runs of neighbouring blocks (MBD-LMs, arXiv 2606.29215), and g(i) the group of token i:

        noisy -> noisy   g(query) == g(key) and b(query) >= b(key)
        noisy -> clean   g(query) >  g(key)

    A row sees as many keys under any groups: in the noisy half what it does not see in the clean one.

    Attributes:
        cu_seqlens: one integer CPU tensor per sample: the document starts, then L; same L for all samples.
        block_size: tokens per block, 1 to L.
        block_grid: "sequence" counts blocks from position 0 of the packed sequence, so a document may begin
            with a short block; "document" counts from the start of each document.
        clean_copy: the input is `[x_t ; x_0]` (S = 2L, noisy half first) rather than one sequence (S = L).
        causal: without a clean copy, hide later blocks. Block size 1 is autoregressive.
        group_starts: with a clean copy, the first token of each token's noise group, int64 [B, L]: whole
            blocks of one document. None: every block is a group of its own.

    Raises BadInput, naming the value, for anything else.
    """

    cu_seqlens: Sequence[Tensor]
    block_size: int
    block_grid: BlockGrid = BlockGrid.sequence
    clean_copy: bool = True
    causal: bool = False
    group_starts: PerToken | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cu_seqlens", tuple(self.cu_seqlens))
        if not self.cu_seqlens:
            raise BadInput("cu_seqlens is empty: give one tensor of document boundaries per sample")
        for sample, boundaries in enumerate(self.cu_seqlens):
            _check_boundaries(sample, boundaries)
        lengths = [int(boundaries[-1]) for boundaries in self._boundaries]
        if len(set(lengths)) > 1:
            raise BadInput(f"cu_seqlens ends at {lengths}: every sample of a micro-batch needs one length")
        if not 1 <= self.block_size <= self.length:
            raise BadInput(f"block_size must be from 1 to the {self.length} tokens, got {self.block_size}")
        if self.block_grid not in list(BlockGrid):
            raise BadInput(f"block_grid must be one of {', '.join(BlockGrid)}, got {self.block_grid!r}")
        if self.clean_copy and self.causal:
            raise BadInput("causal=True needs clean_copy=False: a clean copy is already causal over blocks")
        if self.group_starts is not None:
            self._check_groups(self.group_starts)

    @property
    def batch(self) -> int:
        """Number of samples B."""
        return len(self.cu_seqlens)

    @property
    def length(self) -> int:
        """Data tokens per sequence, L."""
        return int(self._boundaries[0][-1])

    @property
    def total(self) -> int:
        """Positions that the attention sees, S: 2L with a clean copy, L without."""
        return 2 * self.length if self.clean_copy else self.length

    # Documents, groups and blocks are runs of neighbours, so each query sees a range of keys in either half.
    # These [B, L] arrays hold the ends of every token's document, group and block. They are numpy so that
    # shapes which depend on the data can be worked out under fake tensors as well.

    @cached_property
    def document_start(self) -> PerToken:
        """First token of each token's document, [B, L]."""
        return np.stack([_document_starts(cu) for cu in self._boundaries])

    @cached_property
    def document_stop(self) -> PerToken:
        """One past the last token of each token's document, [B, L]."""
        return np.stack([np.repeat(cu[1:], np.diff(cu)) for cu in self._boundaries])

    @cached_property
    def block_start(self) -> PerToken:
        """First token of each token's block within its document, [B, L]."""
        return np.maximum(self._grid_start, self.document_start)

    @cached_property
    def block_stop(self) -> PerToken:
        """One past the last token of each token's block within its document, [B, L]."""
        return np.minimum(self._grid_start + self.block_size, self.document_stop)

    @property
    def group_start(self) -> PerToken:
        """First token of each token's noise group, [B, L]; without groups of its block."""
        return self.block_start if self.group_starts is None else self.group_starts

    @cached_property
    def group_stop(self) -> PerToken:
        """One past the last token of each token's noise group, [B, L]."""
        if self.group_starts is None:
            return self.block_stop
        return np.stack([_stops(starts) for starts in self.group_starts])

    @cached_property
    def has_groups(self) -> bool:
        """Whether any noise group has several blocks."""
        return self.group_starts is not None and bool((self.group_starts != self.block_start).any())

    @cached_property
    def group_tokens(self) -> int:
        """No group has more tokens: a multiple of the block size, so that it takes few values."""
        if self.group_starts is None:
            return self.block_size
        return -(-int((self.group_stop - self.group_start).max()) // self.block_size) * self.block_size

    def whole(self) -> "Rectangle":
        """Return every query against every key. Executors keep their plans with the object: make it once."""
        every_token = np.tile(np.arange(self.length), (self.batch, 1))
        return Rectangle(self, every_token, every_token if self.clean_copy else every_token[:, :0])

    def document_ids(self, sample: int) -> Tensor:
        """Return the index of each token's document, int64 [L]."""
        counts = np.diff(self._boundaries[sample])
        return torch.from_numpy(np.repeat(np.arange(len(counts)), counts))

    def block_ids(self, sample: int) -> Tensor:
        """Return b(i), the index of each token's block on the grid, int64 [L]."""
        position = np.arange(self.length)
        return torch.from_numpy((position - self._grid_origin[sample]) // self.block_size)

    def dense(self, sample: int = 0, rows: Tensor | None = None) -> Tensor:
        """Return bool [S, S], True where a query (row) may see a key (column); quadratic.

        With int64 `rows` only those rows of it, [len(rows), S].
        """
        position = torch.arange(self.total)
        row = position if rows is None else rows
        document, block = (
            ids[position % self.length] for ids in (self.document_ids(sample), self.block_ids(sample))
        )
        same_document = document[row, None] == document
        up_to_block = block[row, None] >= block
        if not self.clean_copy:
            return same_document & up_to_block if self.causal else same_document
        group = block
        if self.group_starts is not None:
            group = torch.from_numpy(self.group_starts[sample])[position % self.length]
        is_noisy = position < self.length
        of_noisy_row = torch.where(
            is_noisy, (group[row, None] == group) & up_to_block, group[row, None] > group
        )
        of_clean_row = ~is_noisy & up_to_block
        return same_document & torch.where(is_noisy[row, None], of_noisy_row, of_clean_row)

    @cached_property
    def pairs_per_token(self) -> PerToken:
        """Keys that the queries of each token see: of both its copies with a clean copy, [B, L]."""
        if not self.clean_copy and not self.causal:
            return self.document_stop - self.document_start
        # A noisy query sees its group up to its block and the clean text before the group: as many keys as
        # its clean copy sees.
        per_half = self.block_stop - self.document_start
        return 2 * per_half if self.clean_copy else per_half

    def visible_pairs(self) -> int:
        """Return the number of visible query-key pairs of the micro-batch, in O(B L)."""
        return int(self.pairs_per_token.sum())

    def _check_groups(self, starts: PerToken) -> None:
        if not self.clean_copy:
            raise BadInput("group_starts needs clean_copy=True: without a clean copy no block sees another's")
        if starts.shape != self.block_start.shape:
            raise BadInput(f"group_starts must be [{self.batch}, {self.length}], got {list(starts.shape)}")
        place = np.arange(self.length)
        begins = starts == place
        expected = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
        needed = self.document_start == place
        fits = (starts == expected) & (begins | ~needed) & (~begins | (self.block_start == place))
        if not fits.all():
            sample, token = np.argwhere(~fits)[0].tolist()
            raise BadInput(
                f"group_starts[{sample}] at token {token} is {int(starts[sample, token])}: groups are runs of"
                " whole blocks, and begin anew with every document"
            )

    @cached_property
    def _boundaries(self) -> list[PerToken]:
        return [boundaries.numpy().astype(np.int64) for boundaries in self.cu_seqlens]

    @property
    def _grid_origin(self) -> PerToken:
        """Where the block grid of each token starts, [B, L]."""
        return _grid_origins(self.document_start, self.block_grid)

    @property
    def _grid_start(self) -> PerToken:
        """Start of each token's block on the grid, before a document cuts it, [B, L]."""
        return _cell_starts(self.document_start, self.block_size, self.block_grid)


def block_starts(cu_seqlens: npt.NDArray[Any], block_size: int, grid: BlockGrid) -> PerToken:
    """First position, int64 [L], of each position's block; a block never spans two documents.

    cu_seqlens: int [documents + 1], the starts of a sample's documents, then L.
    """
    document_start = _document_starts(cu_seqlens)
    return np.maximum(_cell_starts(document_start, block_size, grid), document_start)


def _stops(starts: PerToken) -> PerToken:
    """One past the last entry of each run of equal ones, [L]."""
    edges = np.append(np.flatnonzero(np.diff(starts, prepend=-1)), len(starts))
    return np.repeat(edges[1:], np.diff(edges))


def _document_starts(cu_seqlens: npt.NDArray[Any]) -> PerToken:
    """First token of each token's document, [L]."""
    return np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens)).astype(np.int64)


def _grid_origins(document_start: PerToken, grid: BlockGrid) -> PerToken:
    return np.zeros_like(document_start) if grid == BlockGrid.sequence else document_start


def _cell_starts(document_start: PerToken, block_size: int, grid: BlockGrid) -> PerToken:
    """Start of each token's block on the grid, before a document cuts it, [..., L]."""
    position = np.arange(document_start.shape[-1])
    return position - (position - _grid_origins(document_start, grid)) % block_size


@dataclass(frozen=True)
class KeySpans:
    """Keys [start, stop) of neighbouring queries, int64 [B, n] each; both rise with the query."""

    start: PerToken
    stop: PerToken


@dataclass(frozen=True, eq=False)
class Rectangle:
    """The part of a mask that one executor call computes: the queries of some tokens against their keys.

    Queries: the noisy rows of `tokens`, then the clean rows of the same tokens; without a clean copy their
    only rows. Keys: the noisy keys of `noisy_keys`, then all L clean keys; without a clean copy all L keys.
    Context parallelism gives each rank such a rectangle; `mask.whole()` is the one of a single process.

    Attributes:
        mask: the definition.
        tokens: int64 [B, n], data tokens in rising order.
        noisy_keys: int64 [B, Kn], data tokens in rising order, every token of the groups of `tokens` up to
            their blocks among them; entries equal to L are padding that no query sees. Kn = 0 without a
            clean copy.
        few_rows: a document's rows are few beside its keys, as in decoding: an executor may rather compute
            a hidden pair than make another call.
        window: without a clean copy, what the rows see in the place of what the mask says, as indices of
            keys. Its start and its stop rise with the rows, as those of a mask do.

    Compared and hashed by identity, so that an executor can keep what it derives from one.
    """

    mask: BlockDiffusionMask
    tokens: PerToken
    noisy_keys: PerToken
    few_rows: bool = False
    window: KeySpans | None = None

    @property
    def batch(self) -> int:
        """Number of samples B."""
        return self.mask.batch

    @property
    def queries(self) -> int:
        """Query rows Q of each sample: 2n with a clean copy, else n."""
        return self.tokens.shape[1] * (2 if self.mask.clean_copy else 1)

    @property
    def keys(self) -> int:
        """Keys K of each sample: Kn + L."""
        return self.noisy_keys.shape[1] + self.mask.length

    @cached_property
    def own_block(self) -> KeySpans:
        """What the noisy rows see of the noisy keys: their group up to their block. As indices of keys."""
        edges = self._of_tokens(self.mask.group_start), self._of_tokens(self.mask.block_stop)
        return KeySpans(*(self._count_below(edge) for edge in edges))

    @cached_property
    def past(self) -> KeySpans:
        """What the noisy rows see of the clean keys: those before their group. As indices of keys."""
        return self._clean_spans(self.mask.document_start, self.mask.group_start)

    @cached_property
    def past_and_block(self) -> KeySpans:
        """What the clean rows see, and the only rows of a causal mask. As indices of keys."""
        return self.window or self._clean_spans(self.mask.document_start, self.mask.block_stop)

    @cached_property
    def document(self) -> KeySpans:
        """What the rows of a mask with neither clean copy nor causality see. As indices of keys."""
        return self._clean_spans(self.mask.document_start, self.mask.document_stop)

    def dense(self, sample: int = 0) -> Tensor:
        """Return bool [Q, K], True where a query sees a key: the rows and columns of `mask.dense`."""
        if self.window is not None:
            start, stop = (edges[sample, :, None] for edges in (self.window.start, self.window.stop))
            key = np.arange(self.keys)
            return torch.from_numpy((key >= start) & (key < stop))
        rows = [self.tokens[sample]]
        columns = [np.arange(self.mask.length)]
        if self.mask.clean_copy:
            rows.append(self.tokens[sample] + self.mask.length)
            noisy = self.noisy_keys[sample]
            columns = [
                np.where(noisy < self.mask.length, noisy, self.mask.total),
                columns[0] + self.mask.length,
            ]
        nothing = torch.zeros(self.mask.total, 1, dtype=torch.bool)
        padded = torch.cat([self.mask.dense(sample), nothing], dim=1)
        return padded[np.concatenate(rows)][:, np.concatenate(columns)]

    def visible_pairs(self) -> int:
        """Return the number of visible query-key pairs of the micro-batch."""
        if self.window is not None:
            return int((self.window.stop - self.window.start).sum())
        return int(self._of_tokens(self.mask.pairs_per_token).sum())

    def _of_tokens(self, per_token: PerToken) -> PerToken:
        return np.take_along_axis(per_token, self.tokens, axis=1)

    def _clean_spans(self, start: PerToken, stop: PerToken) -> KeySpans:
        first = self.noisy_keys.shape[1]
        return KeySpans(first + self._of_tokens(start), first + self._of_tokens(stop))

    def _count_below(self, edge: PerToken) -> PerToken:
        """How many noisy keys lie before each edge, [B, n]."""
        pairs = zip(self.noisy_keys, edge, strict=True)
        return np.stack([np.searchsorted(keys, edges) for keys, edges in pairs])


def _check_boundaries(sample: int, boundaries: Tensor) -> None:
    where = f"cu_seqlens[{sample}]"
    if boundaries.device.type != "cpu":
        raise BadInput(f"{where} is on {boundaries.device}: keep document boundaries on the CPU")
    if boundaries.is_floating_point() or boundaries.dtype == torch.bool or boundaries.dim() != 1:
        raise BadInput(
            f"{where} must be a one-dimensional integer tensor, got {boundaries.dtype} "
            f"of shape {tuple(boundaries.shape)}"
        )
    values = boundaries.tolist()
    if len(values) < 2 or values[0] != 0 or any(a >= b for a, b in pairwise(values)):
        raise BadInput(f"{where} must rise strictly from 0 to the sequence length, got {values}")
