"""A pass of micro-batches through the model: megatron-core's contract, and sums over the global batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from llada_megatron.objectives.batch import POSITION_BINS, RATE_BINS, MicroBatch
from llada_megatron.runtime import device


def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """megatron-core's forward-step contract: the model's output and what turns it into a loss."""
    batch = next(batches)
    return model(batch.inputs), partial(loss_sum, batch)


def loss_sum(
    batch: MicroBatch, cross_entropy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted sum of cross entropies [N], its count, and the sums that metrics need."""
    loss = (cross_entropy * batch.weights).sum()
    detached = cross_entropy.detach().double()
    ones = torch.ones_like(detached)
    bins = [
        detached.new_zeros(size).index_add_(0, index, values)
        for size, index in ((RATE_BINS, batch.rate_bin), (POSITION_BINS, batch.position_bin))
        for values in (detached, ones)
    ]
    head = torch.stack([loss.detach().double(), loss.new_tensor(batch.count, dtype=torch.float64)])
    return loss, torch.tensor(batch.count, dtype=torch.int, device=loss.device), torch.cat([head, *bins])


def global_sums(reduced: list[torch.Tensor]) -> torch.Tensor:
    """Sums of every micro-batch of every rank, fp64 on the host; only the last stage has any."""
    total = torch.zeros(2 + 2 * RATE_BINS + 2 * POSITION_BINS, dtype=torch.float64, device=device.device())
    if reduced:
        total += torch.stack(reduced).sum(dim=0)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return total.cpu()


def means(sums_and_counts: torch.Tensor, bins: int) -> list[float | None]:
    """Means of the first `bins` bins; None where nothing was counted."""
    sums, counts = (part[:bins].tolist() for part in sums_and_counts.chunk(2))
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]
