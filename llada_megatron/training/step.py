"""One training step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from llada_megatron.config.schedule import Schedule, Stage
from llada_megatron.config.schema import Config, MomentsAtStart
from llada_megatron.data.packed import PackedSequences
from llada_megatron.diffusion.corruption import data_index
from llada_megatron.diffusion.loss import embedding_noise_sigma
from llada_megatron.model.provider import build_model
from llada_megatron.runtime import device
from llada_megatron.training.balance import ExpertBalance
from llada_megatron.training.batch import (
    POSITION_BINS,
    RATE_BINS,
    MicroBatch,
    autoregressive_batch,
    check_vocabulary,
    context_part,
    diffusion_batch,
)
from llada_megatron.training.embedding import embedding_statistics
from llada_megatron.training.optimizer import LearningRate, build_optimizer, reset_moments, wrap


@dataclass
class Trainer:
    """Everything that a step needs; built once by `assemble`."""

    config: Config
    schedule: Schedule
    data: PackedSequences
    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    learning_rate: LearningRate
    balance: ExpertBalance


def assemble(
    config: Config, schedule: Schedule, data: PackedSequences, *, initialize: bool = True
) -> Trainer:
    """Model, optimizer and schedules of this rank; without `initialize` weights have no values."""
    model = wrap(config, build_model(config, initialize=initialize))
    optimizer = build_optimizer(config, model)
    balance = ExpertBalance(list(model), config.model)
    get_model_config(model[0]).finalize_model_grads_func = balance.finalize
    rate = LearningRate(optimizer, config.optimizer, schedule, config.schedule.rewarm_tokens)
    return Trainer(config, schedule, data, model, optimizer, rate, balance)


@dataclass
class StepResult:
    """Figures of one step over the global batch."""

    loss: float
    grad_norm: float
    lr: float
    skipped: bool
    load_max_over_mean: float | None
    loss_by_t: list[float | None] | None
    """None in autoregressive stages, which have no mask rate."""
    loss_by_block_position: list[float | None]
    mask_row_norm: float
    embedding_noise_sigma: float


def train_step(trainer: Trainer, step: int) -> StepResult:
    """Forward, backward and update of the step's global batch.

    A non-finite loss or gradient norm leaves weights, moments and expert biases as they were.
    """
    stage = trainer.schedule.stage_at(step)
    if step == stage.first_step and stage.moments is MomentsAtStart.reset:
        reset_moments(trainer.optimizer)
    lr = trainer.learning_rate.apply(step)
    statistics = embedding_statistics(trainer.model[0], trainer.config.model.mask_token_id)
    sigma = noise_sigma(trainer, step, statistics.rms)

    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    reduced = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[micro_batches(trainer, stage, step, sigma) for _ in trainer.model],
        model=trainer.model,
        num_microbatches=trainer.config.layout.global_batch // stage.micro_batch // data_parallel()[1],
        seq_length=trainer.config.data.sequence_length * (2 if stage.clean_copy else 1),
        micro_batch_size=stage.micro_batch,
        forward_only=False,
    )
    sums = global_sums(reduced)
    loss = float(sums[0] / sums[1].clamp(min=1))

    trainer.optimizer.prepare_grads()
    grad_norm = float(trainer.optimizer.get_grad_norm())
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
    if not skipped:
        trainer.optimizer.step()
        trainer.balance.update()
    by_t, by_position = sums[2:].split([2 * RATE_BINS, 2 * POSITION_BINS])
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        lr=lr,
        skipped=skipped,
        load_max_over_mean=trainer.balance.load_max_over_mean(),
        loss_by_t=means(by_t, RATE_BINS) if stage.is_diffusion else None,
        loss_by_block_position=means(by_position, min(stage.block_size, POSITION_BINS)),
        mask_row_norm=statistics.mask_row_norm,
        embedding_noise_sigma=sigma,
    )


def data_parallel() -> tuple[int, int]:
    """This process's data-parallel rank and the number of them."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def sample_indices(step: int, micro_batch: int, global_batch: int) -> list[list[int]]:
    """Global sample indices of this rank's micro-batches: the global batch is dealt out in file order."""
    rank, ranks = data_parallel()
    first = step * global_batch
    return [
        list(range(first + start, first + start + micro_batch))
        for start in range(rank * micro_batch, global_batch, ranks * micro_batch)
    ]


def micro_batches(trainer: Trainer, stage: Stage, step: int, sigma: float) -> Iterator[MicroBatch]:
    """This rank's micro-batches of a step, on its device; none is held here while the model has it."""
    for indices in sample_indices(step, stage.micro_batch, trainer.config.layout.global_batch):
        yield context_part(whole_batch(trainer, stage, indices, sigma)).to(device.device())


def whole_batch(trainer: Trainer, stage: Stage, indices: list[int], sigma: float) -> MicroBatch:
    """The micro-batch of these global sample indices, on the host and before context parallelism cuts it."""
    config = trainer.config
    sequences = [data_index(index, config.diffusion) if stage.is_diffusion else index for index in indices]
    samples = [trainer.data[sequence] for sequence in sequences]
    check_vocabulary(samples, config.model.vocab_size)
    if not stage.is_diffusion:
        return autoregressive_batch(samples)
    return diffusion_batch(
        samples,
        indices,
        stage,
        config.diffusion,
        seed=config.run.seed,
        mask_token_id=config.model.mask_token_id,
        noise_sigma=sigma,
    )


def noise_sigma(trainer: Trainer, step: int, rms: float) -> float:
    """Standard deviation of the embedding noise at a step; zero in autoregressive stages."""
    noise = trainer.config.diffusion.embedding_noise
    first = trainer.schedule.first_diffusion_step()
    if step < first:
        return 0.0
    tokens = (step - first) * trainer.schedule.tokens_per_step
    return rms * embedding_noise_sigma(noise.sigma_over_rms, noise.fade_tokens, tokens)


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
