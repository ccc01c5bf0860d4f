"""One training step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from llada_megatron.config.schedule import Schedule, Stage
from llada_megatron.config.schema import Config, MomentsAtStart
from llada_megatron.data.packed import PackedSequences
from llada_megatron.model.provider import build_model
from llada_megatron.objectives.batch import (
    POSITION_BINS,
    RATE_BINS,
    MicroBatch,
    autoregressive_batch,
    check_vocabulary,
    context_part,
    diffusion_batch,
)
from llada_megatron.objectives.corruption import data_index
from llada_megatron.objectives.passes import forward_step, global_sums, means
from llada_megatron.objectives.weights import embedding_noise_sigma
from llada_megatron.parallel.dealing import data_parallel, sample_indices
from llada_megatron.runtime import device
from llada_megatron.training.balance import ExpertBalance
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
