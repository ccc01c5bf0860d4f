"""What context parallelism does to one sequence: balance of work, tokens and bytes of each rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import BlockGrid
from llada_megatron.runtime.launch import launch


@dataclass
class ContextReport:
    """Figures of one layer; bytes are those of keys and values, in forward and backward, as the worst rank
    received them from the collectives that ran."""

    documents: int
    length: int
    block_size: int
    cp: int
    work_max_over_mean: float
    tokens_per_rank: list[int]
    """Data tokens: each rank holds as many noisy and as many clean rows."""
    halo_tokens: int
    """Noisy keys that travel since their block has tokens of several ranks."""
    bytes_counted: int
    bytes_naive: int
    """Bytes when noisy and clean keys are all gathered, also measured."""


def check(
    cu_seqlens: list[int], *, block_size: int, block_grid: str, cp: int, kv_heads: int, head_dim: int
) -> ContextReport:
    """Deal a sequence of documents out to cp processes and let their keys travel, in bf16.

    cu_seqlens: document starts and the end. Raises BadInput for documents, blocks or ranks that do not fit.
    """
    import torch

    from llada_megatron.attention import BlockDiffusionMask
    from llada_megatron.attention.context import ContextShard

    if min(cp, kv_heads, head_dim) < 1:
        raise BadInput(f"--cp {cp}, --kv-heads {kv_heads} and --head-dim {head_dim} must be at least 1.")
    mask = BlockDiffusionMask([torch.tensor(cu_seqlens)], block_size, BlockGrid(block_grid))
    shard = ContextShard(mask, 0, cp)
    owner = shard.owner[0]
    work = np.bincount(owner, weights=mask.pairs_per_token[0], minlength=cp)
    arguments = cu_seqlens, block_size, block_grid, cp, kv_heads, head_dim
    received = launch(_received_bytes, *arguments, processes=cp, preload="llada_megatron.parallel.groups")
    return ContextReport(
        documents=len(cu_seqlens) - 1,
        length=mask.length,
        block_size=block_size,
        cp=cp,
        work_max_over_mean=float(work.max() / work.mean()),
        tokens_per_rank=np.bincount(owner, minlength=cp).tolist(),
        halo_tokens=int(shard.spans_ranks.sum()),
        bytes_counted=max(ours for ours, _ in received),
        bytes_naive=max(naive for _, naive in received),
    )


def _received_bytes(
    cu_seqlens: list[int], block_size: int, block_grid: str, cp: int, kv_heads: int, head_dim: int
) -> tuple[int, int]:
    """Bytes that this rank receives: our exchange, and a gather of both halves."""
    import torch

    from llada_megatron.attention import BlockDiffusionMask
    from llada_megatron.attention.context import ContextShard
    from llada_megatron.config.schema import LayoutConfig
    from llada_megatron.parallel import groups
    from llada_megatron.verify.traffic import ReceivedBytes

    groups.initialize(LayoutConfig(cp=cp, processes=cp))
    try:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        group = parallel_state.get_context_parallel_group()
        mask = BlockDiffusionMask([torch.tensor(cu_seqlens)], block_size, BlockGrid(block_grid))
        shard = ContextShard(mask, group.rank(), cp)
        shape = shard.rows.shape[1], 1, kv_heads, head_dim
        key, value = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        with ReceivedBytes() as ours:
            keys, values = shard.of(key, value, 1, group)
            torch.autograd.backward([keys, values], [keys.detach(), values.detach()])
        with ReceivedBytes() as naive:
            both = gather_from_sequence_parallel_region(torch.stack([key, value], dim=2), group=group)
            both.backward(both.detach())
        return ours.total, naive.total
    finally:
        groups.destroy()
