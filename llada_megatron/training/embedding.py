"""Two figures of the embedding table: what noise on embeddings is measured by, and the mask token's row.

Its rows lie on the first stage's tensor-parallel ranks. Neither makes a copy of it: a norm over one dimension
converts what it reads (on CUDA within its kernel, aten/native/ReduceOpsUtils.h, make_reduction).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_attr_wrapped_model

from llada_megatron.runtime import device

Figures = Callable[[Any], list[torch.Tensor]]
"""Of the table with this rank's rows [V/tp, H]: fp64 scalars that add up over the ranks."""


def embedding_rms(first_chunk: DistributedDataParallel) -> float:
    """Root mean square of the table's entries, on every rank, before a step's first forward."""

    def figures(table: Any) -> list[torch.Tensor]:
        _finish_gather(first_chunk, table.weight)
        squares = _norms(table.weight).square().sum()
        return [squares, torch.full_like(squares, table.weight.numel())]

    squares, entries = _over_ranks(first_chunk, figures, 2)
    return (squares / entries) ** 0.5


def mask_row_norm(first_chunk: DistributedDataParallel, mask_token_id: int) -> float:
    """L2 norm of the mask token's row, on every rank, after a step's passes: they have gathered the table."""

    def figures(table: Any) -> list[torch.Tensor]:
        row = mask_token_id - table.vocab_start_index
        return [_norms(table.weight[max(row, 0) : max(row + 1, 0)]).square().sum()]

    return _over_ranks(first_chunk, figures, 1)[0] ** 0.5


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """fp64, of each row summed in fp32: a row lies on one rank, so no layout sums it otherwise."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).double()


@torch.no_grad()
def _over_ranks(first_chunk: DistributedDataParallel, figures: Figures, count: int) -> list[float]:
    """The figures' sums, in one message to all ranks of a model's replica."""
    sums = torch.zeros(count, dtype=torch.float64, device=device.device())
    if parallel_state.is_pipeline_first_stage(ignore_virtual=True):
        table = get_attr_wrapped_model(first_chunk, "embedding").word_embeddings
        sums += torch.stack(figures(table))
    dist.all_reduce(sums, group=parallel_state.get_model_parallel_group())
    return list(sums.tolist())


def _finish_gather(chunk: DistributedDataParallel, weight: torch.nn.Parameter) -> None:
    """With overlap_param_gather the optimizer leaves a share on each rank; the next forward gathers them.

    A frozen table has no shares.
    """
    if chunk.ddp_config.overlap_param_gather and weight.requires_grad:
        aligned = chunk.ddp_config.align_param_gather
        chunk.param_to_bucket_group[weight].finish_param_sync(skip_next_bucket_dispatch=aligned)
