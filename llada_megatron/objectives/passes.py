"""A pass of a step's micro-batches through the model, with gradients or without, and sums over its batch.

megatron-core divides the gradients by one count over the global batch. A loss with several denominators,
sum over k of sums[k] / counts[k], is brought to that form before the backward pass:

    sum over k of sums[k] ratios[k],   ratios[k] = counts[0] / counts[k],   then one division by counts[0]

which takes the global counts beforehand: from the batches where these say them; where only the model tells
them, from the one micro-batch that each rank has, else from one pass more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.objective import Loss, Objective
from llada_megatron.runtime import device


def forward_step(
    objective: Objective,
    ratios: Sequence[float] | None,
    batches: Iterator[MicroBatch],
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
) -> tuple[Any, Any]:
    """megatron-core's forward-step contract: the model's output and what turns it into a loss.

    return_schedule_plan: in the output's place the plan of a forward, as layout.overlap_experts asks for it.
    """
    batch = next(batches)
    run: Any = model.build_schedule_plan if return_schedule_plan else model
    return run(batch.inputs), partial(reduced, objective, ratios, batch)


def reduced(
    objective: Objective, ratios: Sequence[float] | None, batch: MicroBatch, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss to differentiate, its count, and the sums of `Geometry.sums` numbers, fp64, for the record.

    ratios: None where every rank has one micro-batch, so that the global counts are there once all were read
    out.
    """
    loss = objective.loss(batch, output)
    if ratios is None:
        ratios = ratios_of(_over_ranks([float(count) for count in loss.counts]))
    total = loss.sums[0]
    for part, ratio in zip(loss.sums[1:], ratios[1:], strict=True):
        total = total + part * ratio
    count = torch.as_tensor(loss.counts[0], dtype=torch.int, device=total.device)
    return total, count, _record(objective, loss, total)


def _record(objective: Objective, loss: Loss, like: torch.Tensor) -> torch.Tensor:
    """sums[k], counts[k], then for each figure the sums and the counts of its bins."""
    head = [part.detach().double() for part in loss.sums]
    head += [torch.as_tensor(count, device=like.device).double() for count in loss.counts]
    parts = [torch.stack(head)]
    for name, figure in objective.geometry.figures.items():
        bins, values = loss.figures[name]
        values = values.detach().double()
        for added in (values, torch.ones_like(values)):
            parts.append(values.new_zeros(figure.bins).index_add_(0, bins, added))
    return torch.cat(parts)


def global_sums(reduced: list[torch.Tensor], size: int) -> torch.Tensor:
    """Sums of every micro-batch of every rank, fp64 [size] on the host; only the last pp_stage has any."""
    total = torch.zeros(size, dtype=torch.float64, device=device.device())
    if reduced:
        total += torch.stack(reduced).sum(dim=0)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return total.cpu()


def read_record(
    objective: Objective, total: torch.Tensor
) -> tuple[float, list[float], dict[str, list[float | None]]]:
    """The loss, its counts, and the figures' means, from sums over the global batch."""
    terms = objective.geometry.denominators
    sums, counts, figures = total.split([terms, terms, len(total) - 2 * terms])
    loss = float((sums / counts.clamp(min=1)).sum())
    means, at = {}, 0
    for name, figure in objective.geometry.figures.items():
        means[name] = _means(figures[at : at + 2 * figure.bins])
        at += 2 * figure.bins
    return loss, counts.tolist(), means


def _means(sums_and_counts: torch.Tensor) -> list[float | None]:
    sums, counts = (part.tolist() for part in sums_and_counts.chunk(2))
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]


def ratios_of(counts: Sequence[float]) -> list[float]:
    """counts[0] / counts[k]; 0 where nothing was counted, whose sum is then 0 too."""
    return [counts[0] / count if count else 0.0 for count in counts]


def known_counts(batches: Sequence[MicroBatch]) -> list[float]:
    """The counts of this rank's micro-batches, after `context_part`, over the global batch."""
    return _over_ranks([sum(of_batches) for of_batches in zip(*(b.counts for b in batches), strict=True)])


def _over_ranks(counts: Sequence[float]) -> list[float]:
    """Counts summed over data-parallel replicas and context-parallel parts."""
    total = torch.tensor(counts, dtype=torch.float64, device=device.device())
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return total.tolist()


class evaluating:
    """Models in eval mode without gradients, and back as they were."""

    def __init__(self, model: Sequence[torch.nn.Module]) -> None:
        self.model, self.no_grad = model, torch.no_grad()

    def __enter__(self) -> None:
        self.was_training = [chunk.training for chunk in self.model]
        self.no_grad.__enter__()
        for chunk in self.model:
            chunk.eval()

    def __exit__(self, *exception: Any) -> None:
        for chunk, training in zip(self.model, self.was_training, strict=True):
            chunk.train(training)
        self.no_grad.__exit__(*exception)


def forward_only(
    model: Sequence[torch.nn.Module],
    iterators: list[Iterator[MicroBatch]],
    collect: Callable[[MicroBatch, torch.Tensor], torch.Tensor],
    **sizes: int,
) -> list[torch.Tensor]:
    """collect(batch, output) of each micro-batch, on the last pp_stage; elsewhere nothing.

    One iterator per virtual stage of this rank; sizes: num_microbatches, seq_length and micro_batch_size of
    megatron-core's schedules.
    """

    def step(batches: Iterator[MicroBatch], stage: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        return stage(batch.inputs), partial(_collected, collect, batch)

    with evaluating(model):
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators,
            model=list(model),
            forward_only=True,
            **sizes,
        )


def _collected(
    collect: Callable[[MicroBatch, torch.Tensor], torch.Tensor], batch: MicroBatch, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    one = torch.ones((), dtype=torch.int, device=output.device)
    return output.sum(), one, collect(batch, output)


def on_every_rank(
    outputs: list[torch.Tensor], places: Sequence[tuple[int, torch.Tensor | None]], columns: int
) -> list[torch.Tensor]:
    """Readouts of whole micro-batches, fp64 [N, columns] on the host of every rank of a model's replica.

    outputs: of this rank's parts, in the order of `places`, on the last pp_stage; elsewhere none.
    places: the N of each whole micro-batch, and `MicroBatch.places` of this rank's part of it.
    """
    sizes = [N for N, _ in places]
    gathered = torch.zeros(sum(sizes), columns, dtype=torch.float64, device=device.device())
    for whole, output, (_, here) in zip(gathered.split(sizes), outputs, places, strict=False):
        rows = slice(None) if here is None else here.to(output.device)
        whole[rows] = output.detach().double().reshape(-1, columns)
    dist.all_reduce(gathered, group=parallel_state.get_context_parallel_group())
    dist.all_reduce(gathered, group=parallel_state.get_pipeline_model_parallel_group())
    return list(gathered.cpu().split(sizes))


class _SumOverContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor) -> torch.Tensor:
        whole = part.clone()
        dist.all_reduce(whole, group=parallel_state.get_context_parallel_group())
        return whole

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad  # every rank differentiates the whole by its own part


class _CountedOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value if parallel_state.get_context_parallel_rank() == 0 else torch.zeros_like(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def sum_over_context(part: torch.Tensor) -> torch.Tensor:
    """The sum of every context-parallel rank's part; each rank's gradient is that of its own part.

    For what is computed from it alike on every rank; the result then has to be `counted_once`.
    """
    return part if parallel_state.get_context_parallel_world_size() == 1 else _SumOverContext.apply(part)


def counted_once(value: torch.Tensor) -> torch.Tensor:
    """A term of the loss that every context-parallel rank computed: it counts on one, its gradient on all."""
    return value if parallel_state.get_context_parallel_world_size() == 1 else _CountedOnce.apply(value)
