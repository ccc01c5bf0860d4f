"""Which samples of the global batch are this process's."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core import parallel_state

Deal = Callable[[int, int, int], list[list[int]]]
"""(first sample, micro-batch, global batch) -> global sample indices of each of this rank's micro-batches."""


def data_parallel() -> tuple[int, int]:
    """This process's data-parallel rank and the number of them."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def even_parts(count: int, size: int, multiple: int = 1) -> list[list[int]]:
    """This rank's micro-batches of `size` of the numbers below `count`, as many of them on every rank.

    Their number is one of `multiple`; where that does not come out even the last number comes again.
    """
    rank, ranks = data_parallel()
    per_rank = -(-count // (multiple * size * ranks)) * multiple * size
    mine = [min(index, count - 1) for index in range(rank * per_rank, (rank + 1) * per_rank)]
    return [mine[at : at + size] for at in range(0, per_rank, size)]


def sample_indices(first: int, micro_batch: int, global_batch: int) -> list[list[int]]:
    """Global sample indices of this rank's micro-batches: the global batch is dealt out in file order.

    first: of the step.
    """
    rank, ranks = data_parallel()
    return [
        list(range(first + start, first + start + micro_batch))
        for start in range(rank * micro_batch, global_batch, ranks * micro_batch)
    ]
