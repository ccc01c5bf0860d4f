"""Two figures of the embedding table that the noise and the metrics need."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_attr_wrapped_model


class EmbeddingStatistics(NamedTuple):
    """rms: root mean square of the table's entries; mask_row_norm: L2 norm of the mask token's row."""

    rms: float
    mask_row_norm: float


@torch.no_grad()
def embedding_statistics(first_chunk: DistributedDataParallel, mask_token_id: int) -> EmbeddingStatistics:
    """Statistics of the whole table, on every rank; its rows lie on the first stage's tensor ranks."""
    sums = torch.zeros(3, dtype=torch.float64)  # squares, entries, squares of the mask row
    if parallel_state.is_pipeline_first_stage(ignore_virtual=True):
        table = get_attr_wrapped_model(first_chunk, "embedding").word_embeddings
        weight = table.weight
        _finish_gather(first_chunk, weight)
        first, end = table.vocab_start_index, table.vocab_end_index
        sums[0], sums[1] = weight.float().square().sum().double(), weight.numel()
        if first <= mask_token_id < end:
            sums[2] = weight[mask_token_id - first].float().square().sum().double()
        sums = sums.to(weight.device)
        dist.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
    else:
        sums = sums.to(next(first_chunk.parameters()).device)
    dist.broadcast(
        sums,
        src=parallel_state.get_pipeline_model_parallel_first_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    squares, entries, mask_squares = sums.tolist()
    return EmbeddingStatistics((squares / entries) ** 0.5, mask_squares**0.5)


def _finish_gather(chunk: DistributedDataParallel, weight: torch.nn.Parameter) -> None:
    """With overlap_param_gather the optimizer leaves a share on each rank; the next forward gathers them.

    A frozen table has no shares.
    """
    if chunk.ddp_config.overlap_param_gather and weight.requires_grad:
        aligned = chunk.ddp_config.align_param_gather
        chunk.param_to_bucket_group[weight].finish_param_sync(skip_next_bucket_dispatch=aligned)
