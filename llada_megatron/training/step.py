"""One training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from llada_megatron.checkpoint.average import WeightAverage
from llada_megatron.config.choices import BadSamples
from llada_megatron.config.schedule import Schedule, Stage
from llada_megatron.config.schema import Config, ModelConfig, MomentsAtStart
from llada_megatron.config.stage_settings import model_of
from llada_megatron.data.packed import PackedSequences
from llada_megatron.model import speed
from llada_megatron.model.provider import build_model
from llada_megatron.model.readout import Readout
from llada_megatron.model.rotary import set_frequencies
from llada_megatron.objectives import passes
from llada_megatron.objectives.batch import MicroBatch, context_part
from llada_megatron.objectives.objective import Objective
from llada_megatron.objectives.registry import objective_of
from llada_megatron.parallel.dealing import Deal, data_parallel, sample_indices
from llada_megatron.runtime import device
from llada_megatron.training.ahead import Ahead, builder
from llada_megatron.training.balance import ExpertBalance
from llada_megatron.training.cuda_graphs import Graphs
from llada_megatron.training.embedding import embedding_rms, mask_row_norm
from llada_megatron.training.expert_rows import ExpertRows
from llada_megatron.training.frozen import freeze
from llada_megatron.training.optimizer import LearningRate, build_optimizer, reset_moments, wrap
from llada_megatron.training.spikes import Spikes
from llada_megatron.training.watch import Watch


@dataclass
class Trainer:
    """Everything that a step needs; built once by `assemble`."""

    config: Config
    schedule: Schedule
    data: Callable[[int], PackedSequences]
    """The sequences that a step trains, by their global index."""
    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    learning_rate: LearningRate
    balance: ExpertBalance
    rows: ExpertRows
    watch: Watch
    objectives: Mapping[str, Objective]
    """By the name that stages give."""
    graphs: Graphs
    average: WeightAverage | None = None
    spikes: Spikes = field(default_factory=Spikes)
    deal: Deal = sample_indices
    on_batch: Callable[[list[int], MicroBatch], None] | None = None
    """Sees every micro-batch that is built, whole, with its sample indices: a run's journal."""
    builder: Executor = field(default_factory=builder)
    """Builds micro-batches while the model runs."""
    onto_device: Callable[[Iterator[MicroBatch]], Iterator[MicroBatch]] | None = None
    """In the place of the function of that name: the dry run's."""
    frequencies: ModelConfig | None = None
    """What the model's rotary frequencies were set by, where a stage has set them."""
    section: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()
    """Surrounds a part of the step, `passes` or `optimizer`: a benchmark's stopwatch."""


def assemble(
    config: Config,
    schedule: Schedule,
    data: Callable[[int], PackedSequences],
    *,
    initialize: bool = True,
    attention: Callable[..., torch.Tensor] | None = None,
) -> Trainer:
    """Model, optimizer and schedules of this rank.

    Without `initialize` weights have no values; `attention` takes the place of the configured executor.
    """
    speed.open_buffers(config, schedule)
    stages = build_model(config, initialize=initialize, attention=attention)
    freeze(config, stages)
    model = wrap(config, stages)
    optimizer = build_optimizer(config, model)
    balance, rows = ExpertBalance(list(model), config.model), ExpertRows(config, list(model))
    get_model_config(model[0]).finalize_model_grads_func = balance.finalize
    watch = Watch(config, list(model))
    rate = LearningRate(optimizer, config.optimizer, schedule, config.schedule.rewarm_tokens)
    names = dict.fromkeys(stage.objective for stage in schedule.stages)
    objectives = {name: objective_of(name, config, schedule) for name in names}
    decay = config.training.ema_decay
    average = WeightAverage(optimizer, decay) if decay else None
    graphs = Graphs(config, model, optimizer)
    return Trainer(
        *(config, schedule, data, model, optimizer, rate, balance, rows, watch, objectives, graphs, average)
    )


@dataclass
class StepResult:
    """Figures of one step over the global batch."""

    loss: float
    grad_norm: float
    lr: float
    skipped: bool
    spike: str
    """Why it was skipped although all was finite, as a clause; empty else."""
    load_max_over_mean: float | None
    expert_rows_max_over_mean: float | None
    expert_rows_dropped: float | None
    mask_row_norm: float
    """Of the mask token's embedding."""
    embedding_noise_sigma: float
    figures: dict[str, Any]
    """By the names that the stage's objective gives them."""
    watched: dict[str, Any]
    """Of training/watch.py, in the steps that it watches."""


def train_step(trainer: Trainer, step: int) -> StepResult:
    """Forward, backward and update of the step's global batch.

    A loss or gradient norm that is not finite or is a spike, or a batch of which every sample is left out,
    leaves weights, moments and expert biases as they were.
    """
    stage = trainer.schedule.stage_at(step)
    objective = trainer.objectives[stage.objective]
    open_stage(trainer, step)
    _announce(trainer, step)
    lr = trainer.learning_rate.apply(step)
    sigma = _noise_sigma(trainer, objective, step)

    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    sizes = pass_sizes(stage)
    trainer.graphs.begin(sizes)
    trainer.rows.begin()
    trainer.watch.begin(step)
    build = partial(micro_batches, trainer, objective, stage, step, sigma)
    if objective.draft_readout is not None:
        build = partial(build, drafts=_drafts(trainer, objective, stage, step, sigma))
    if objective.statistics_readout is not None:
        objective.summed = _statistics(trainer, objective, build, sizes)
    ratios = _ratios(trainer, objective, build, sizes)
    with trainer.section("passes"):
        reduced = get_forward_backward_func()(
            forward_step_func=partial(passes.forward_step, objective, ratios),
            data_iterator=_for_every_chunk(trainer, build, sizes),
            model=trainer.model,
            forward_only=False,
            **sizes,
        )
    total = passes.global_sums(reduced, objective.geometry.sums)
    loss, counts, means = passes.read_record(objective, total)

    trainer.optimizer.prepare_grads()
    grad_norm = float(trainer.optimizer.get_grad_norm())
    trainer.watch.norms(trainer.optimizer)
    all_left_out = trainer.config.training.bad_samples is BadSamples.skip and not any(counts)
    row_norm = mask_row_norm(trainer.model[0], trainer.config.model.mask_token_id)
    skipped = all_left_out or not (math.isfinite(loss) and math.isfinite(grad_norm))
    spike = "" if skipped else trainer.spikes.found(trainer.config.training, loss, grad_norm)
    skipped = skipped or bool(spike)
    if not skipped:
        trainer.spikes.learnt(trainer.config.training, loss, grad_norm)
        _update(trainer)
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        lr=lr,
        skipped=skipped,
        spike=spike,
        **trainer.rows.figures(trainer.balance.load_max_over_mean(), sizes)._asdict(),
        mask_row_norm=row_norm,
        embedding_noise_sigma=sigma,
        figures=objective.shown(stage, means),
        watched=trainer.watch.figures(),
    )


def _noise_sigma(trainer: Trainer, objective: Objective, step: int) -> float:
    """Standard deviation of the noise on masked tokens' embeddings; where there is none nothing is read."""
    over_rms = objective.noise_over_rms(step)
    return over_rms * embedding_rms(trainer.model[0]) if over_rms else 0.0


def _update(trainer: Trainer) -> None:
    """What a step changes: weights and moments, their average, and the experts' biases."""
    with trainer.section("optimizer"):
        trainer.optimizer.step()
        if trainer.average is not None:
            trainer.average.update()
    trainer.balance.update()


def use_stage(trainer: Trainer, stage: Stage) -> None:
    """Give the model the rotary frequencies of a stage."""
    own = model_of(trainer.config.model, trainer.config.schedule.stages[stage.index])
    if own != (trainer.frequencies or trainer.config.model):
        for chunk in trainer.model:
            set_frequencies(chunk, own)
        trainer.frequencies = own


def open_stage(trainer: Trainer, step: int) -> None:
    """What the first step of a stage begins with, whether it is trained or passed over."""
    stage = trainer.schedule.stage_at(step)
    use_stage(trainer, stage)
    if step != stage.first_step:
        return
    trainer.spikes.clear()
    if stage.moments is MomentsAtStart.reset:
        reset_moments(trainer.optimizer)


def pass_sizes(stage: Stage) -> dict[str, int]:
    """What megatron-core's schedules ask of a pass over a step's global batch."""
    return {
        "num_microbatches": stage.global_batch // stage.micro_batch // data_parallel()[1],
        "seq_length": stage.sequence_length * stage.rows_per_token,
        "micro_batch_size": stage.micro_batch,
    }


def micro_batches(
    trainer: Trainer,
    objective: Objective,
    stage: Stage,
    step: int,
    sigma: float,
    drafts: list[torch.Tensor] | None = None,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of a step, on the host; none is held here while the model has it."""
    data = trainer.data(step)
    for index, indices in enumerate(_dealt(trainer, stage, step)):
        draft = {} if drafts is None else {"draft": drafts[index]}
        yield _part(trainer, objective, data, stage, indices, noise_sigma=sigma, **draft)


def onto_device(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """Micro-batches on this rank's device, of which none is held here."""
    here = device.device()
    return map(lambda batch: batch.to(here), batches)


def _for_every_chunk(
    trainer: Trainer, build: Callable[[], Iterator[MicroBatch]], sizes: dict[str, int]
) -> list[Iterator[MicroBatch]]:
    """An iterator over the step's micro-batches for each virtual stage, which are built once and ahead."""
    ahead = Ahead(build(), sizes["num_microbatches"], len(trainer.model), trainer.builder)
    return [(trainer.onto_device or onto_device)(ahead.reader()) for _ in trainer.model]


def _dealt(trainer: Trainer, stage: Stage, step: int) -> list[list[int]]:
    """Global sample indices of this rank's micro-batches of a step."""
    first = trainer.schedule.samples_before(step)
    return trainer.deal(first, stage.micro_batch, stage.global_batch)


def _announce(trainer: Trainer, step: int) -> None:
    """Let the data read ahead what this rank needs in this step and in the next one."""
    wanted: dict[PackedSequences, list[int]] = {}
    for each in range(step, min(step + 2, trainer.schedule.total_steps)):
        stage, data = trainer.schedule.stage_at(each), trainer.data(each)
        if not isinstance(data, PackedSequences):
            return  # a benchmark's
        indices = [index for part in _dealt(trainer, stage, each) for index in part]
        wanted.setdefault(data, []).extend(trainer.objectives[stage.objective].sequences(indices))
    for data, sequences in wanted.items():
        data.announce(sequences)


def _part(
    trainer: Trainer,
    objective: Objective,
    data: PackedSequences,
    stage: Stage,
    indices: list[int],
    **options: Any,
) -> MicroBatch:
    """This rank's part of the micro-batch of these samples."""
    batch = objective.batch(data, indices, stage, **options)
    batch.inputs.readout = objective.readout
    if trainer.on_batch is not None:
        trainer.on_batch(indices, batch)
    return context_part(batch)


def _drafts(
    trainer: Trainer, objective: Objective, stage: Stage, step: int, sigma: float
) -> list[torch.Tensor]:
    """What the model makes of each draft batch of the last turn, fp64 [N, columns] on the host."""
    readout, sizes = objective.draft_readout, pass_sizes(stage)
    assert readout is not None
    drafts: list[torch.Tensor] = []
    for _ in range(objective.draft_turns):
        places: list[tuple[int, torch.Tensor | None]] = []
        build = partial(_draft_batches, trainer, objective, stage, step, sigma, readout, drafts, places)
        outputs = passes.forward_only(
            trainer.model,
            _for_every_chunk(trainer, build, sizes),
            lambda _, output: output.detach(),
            **sizes,
        )
        drafts = passes.on_every_rank(outputs, places, readout.columns)
    return drafts


def _draft_batches(
    trainer: Trainer,
    objective: Objective,
    stage: Stage,
    step: int,
    sigma: float,
    readout: Readout,
    drafts: list[torch.Tensor],
    places: list[tuple[int, torch.Tensor | None]],
) -> Iterator[MicroBatch]:
    """This rank's parts of a turn's batches; adds to `places` the N of each whole one, and which are here."""
    data = trainer.data(step)
    for index, indices in enumerate(_dealt(trainer, stage, step)):
        draft = drafts[index] if drafts else None
        whole = objective.draft_batch(data, indices, stage, noise_sigma=sigma, draft=draft)
        whole.inputs.readout = readout
        part = context_part(whole)
        places.append((len(whole.inputs.outputs), part.places))
        yield part


def _statistics(
    trainer: Trainer, objective: Objective, build: Callable[[], Iterator[MicroBatch]], sizes: dict[str, int]
) -> torch.Tensor | None:
    """What the objective counts of a step before its loss; None where the loss finds out."""
    if sizes["num_microbatches"] == 1:
        return None

    readout = objective.statistics_readout
    assert readout is not None

    def read_out_so() -> Iterator[MicroBatch]:
        for batch in build():
            batch.inputs.readout = readout
            yield batch

    counted = passes.forward_only(
        trainer.model, _for_every_chunk(trainer, read_out_so, sizes), objective.statistics, **sizes
    )
    return passes.global_sums(counted, len(counted[0]))


def _ratios(
    trainer: Trainer, objective: Objective, build: Callable[[], Iterator[MicroBatch]], sizes: dict[str, int]
) -> list[float] | None:
    """What brings the denominators to one; None where the loss finds out (objectives/passes.py)."""
    counts = _counts(trainer, objective, build, sizes)
    trainer.rows.weigh_losses(counts, sizes)
    if objective.geometry.denominators == 1:
        return [1.0]
    return passes.ratios_of(counts) if counts else None


def _counts(
    trainer: Trainer, objective: Objective, build: Callable[[], Iterator[MicroBatch]], sizes: dict[str, int]
) -> list[float] | None:
    """The denominators over the global batch; None where nothing asks beforehand, or the loss finds out."""
    terms, weighs = objective.geometry.denominators, trainer.rows.has_losses
    if terms == 1 and not weighs:
        return None
    if objective.counts_known:
        built = trainer.builder.submit(lambda: list(build())).result()
        return passes.known_counts(built)
    if sizes["num_microbatches"] == 1 and not weighs:
        return None
    counted = passes.forward_only(
        trainer.model,
        _for_every_chunk(trainer, build, sizes),
        lambda batch, output: passes.reduced(objective, [1.0] * terms, batch, output)[2],
        **sizes,
    )
    return passes.read_record(objective, passes.global_sums(counted, objective.geometry.sums))[1]
