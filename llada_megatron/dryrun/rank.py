"""The exact plan: training's own step on chosen ranks of a layout, dry, with what each holds and sends.

    python -m llada_megatron.dryrun.rank CONFIG.yaml STAGE MICRO_BATCHES RANK ... [--count-only]

is what `llada plan --exact` starts; every rank answers with one line of JSON, a RankReport. Model, loss,
schedule, optimizer and step are training's own. What stands in for other ranks and for kernels is in
runtime/fake_world.py; data, masks and the executor of attention are replaced here.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from llada_megatron.config import rules
from llada_megatron.config.compose import load
from llada_megatron.config.layout import coordinates, data_parallel_size
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import Config
from llada_megatron.config.stage_settings import at_stage
from llada_megatron.data.packed import PackedSample
from llada_megatron.dryrun.recorder import Recorder
from llada_megatron.model.dlcm import Arrangement, DynamicConcepts
from llada_megatron.model.provider import build_model
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.corruption import Corruption
from llada_megatron.objectives.diffusion import Diffusion
from llada_megatron.objectives.preference import SIDES, Preference
from llada_megatron.objectives.reference import ReferenceScores
from llada_megatron.parallel import groups
from llada_megatron.runtime import fake_world, garbage
from llada_megatron.training import step
from llada_megatron.training.step import Trainer

from megatron.core.utils import get_attr_wrapped_model, get_model_config  # isort: skip

MASK_RATE = 0.5
POINTS_OF_TIME, ORIGINS = 200, 24


@dataclass
class RankReport:
    """What one rank holds and sends in a step; bytes, and elements in `parameters`."""

    rank: int
    pp: int
    parameters: dict[str, int]
    """sharded (by tensor parallelism), replicated, expert, and bias, the elements of expert_bias."""
    static: dict[str, int] = field(default_factory=dict)
    """weights, gradients, optimizer, and other: small constants."""
    kept: list[int] = field(default_factory=list)
    """By virtual stage: what its first forward leaves behind, without scalars."""
    peak: int = 0
    """Live at once, `static` included."""
    peak_origins: list[tuple[str, str, int]] = field(default_factory=list)
    """Phase, module and bytes of what the step had made and was alive at the peak, largest first."""
    over_time: list[int] = field(default_factory=list)
    """Live bytes through the step."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """group, ranks, operation, phase, calls and bytes, of groups with several ranks."""
    seconds: float = 0.0


class OneDocument:
    """Sequences that are one document each, or the two texts of one pair."""

    def __init__(self, length: int, *, texts: int = 1) -> None:
        edges = np.linspace(0, length, texts + 1).astype(np.int32)
        whole = None if texts == 1 else np.ones(length, dtype=bool)
        tokens = np.zeros(length, dtype=np.int64)
        self.sample = PackedSample(tokens, edges, document_ids=np.arange(texts), supervised=whole)

    def __getitem__(self, index: int) -> PackedSample:
        return self.sample


def half_masked(seed: int, sample: int, cu_seqlens: np.ndarray, *unused: Any) -> Corruption:
    """Every other token masked: whole numbers of supervised rows, alike on every context-parallel rank."""
    masked = np.arange(cu_seqlens[-1]) % 2 == 0
    return Corruption(masked, np.full(len(masked), MASK_RATE))


def half_scored(
    seed: int, document: int, draw: int, draws: int, starts: np.ndarray, supervised: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As `half_masked`, of a text of a pair."""
    masked = np.arange(len(starts)) % 2 == 0
    return masked, masked / MASK_RATE


def every_concept(
    R: float, length: int, opened_T: torch.Tensor, arranged: Callable[[np.ndarray], Arrangement]
) -> Arrangement:
    """A concept every R tokens of a sequence, in the place of boundaries without values."""
    places = np.arange(len(opened_T)) % length
    with _disable_current_modes():
        return arranged(np.floor(places / R) > np.floor((places - 1) / R))


def count_parameters(config: Config, rank: int) -> RankReport:
    """A rank's parameters alone: its model is built, nothing runs."""
    with _rank_of(config, rank), FakeTensorMode(), fake_world.contracts():
        return RankReport(rank, _stage_of(config, rank), _parameters(build_model(config, initialize=False)))


def run_rank(config: Config, stage: Stage, rank: int, micro_batches: int, *, fake: bool = True) -> RankReport:
    """One training step of `stage` on a rank, with so many micro-batches.

    Without `fake` tensors and weights are real: a check of the dry run, for layouts of one process.
    """
    began = time.perf_counter()
    config = _dry(config, stage, micro_batches)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    recorder = Recorder()
    contracts = fake_world.contracts()
    collected = garbage.by_hand(1)  # where we ask for it: the peak must not depend on the collector's mood
    with _rank_of(config, rank), mode or nullcontext(), contracts, recorder, collected:
        data = OneDocument(config.data.sequence_length)
        trainer = step.assemble(
            config,
            rules.schedule_of(config),
            partial(_always, data),
            initialize=not fake,
            attention=fake_world.fused_attention,
        )
        report = RankReport(rank, _stage_of(config, rank), _parameters(trainer.model))
        gc.collect()
        report.static = _static(trainer)
        report.static["other"] = recorder.current - sum(report.static.values())
        get_model_config(trainer.model[0]).deallocate_pipeline_outputs = True  # as on CUDA
        recorder.forget()
        with _watched(recorder, mode, trainer, report), recorder.phase("step"):
            step.train_step(trainer, 0)
    report.peak = recorder.peak
    found = Counter({origin: size for origin, size in recorder.at_peak().items() if origin.phase != "start"})
    report.peak_origins = [(*origin, size) for origin, size in found.most_common(ORIGINS)]
    report.over_time = recorder.over_time(POINTS_OF_TIME)
    report.messages = [
        {**message._asdict(), "calls": calls, "bytes": size}
        for message, (calls, size) in sorted(recorder.messages.items())
    ]
    report.seconds = time.perf_counter() - began
    return report


def _dry(config: Config, stage: Stage, micro_batches: int) -> Config:
    """This stage alone, with so many micro-batches per step, without noise on embeddings, which fades."""
    noise = replace(config.diffusion.embedding_noise, sigma_over_rms=0.0)
    samples = micro_batches * stage.micro_batch * data_parallel_size(config.layout)
    config = at_stage(config, stage.index)
    alone = replace(config.schedule.stages[stage.index], global_batch=0)
    return replace(
        config,
        diffusion=replace(config.diffusion, embedding_noise=noise),
        schedule=replace(config.schedule, stages=[alone]),
        layout=replace(config.layout, global_batch=samples),
    )


@contextmanager
def _rank_of(config: Config, rank: int) -> Iterator[None]:
    with fake_world.world(rank, config.layout.processes):
        try:
            groups.initialize(config.layout)
            yield
        finally:
            groups.destroy()


def _stage_of(config: Config, rank: int) -> int:
    return coordinates(config.layout, rank).pp


def _parameters(model: list[torch.nn.Module]) -> dict[str, int]:
    found = Counter(sharded=0, replicated=0, expert=0, bias=0)
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            sharded = "sharded" if getattr(parameter, "tensor_model_parallel", False) else "replicated"
            found["expert" if ".local_experts." in name else sharded] += parameter.numel()
        for name, buffer in chunk.named_buffers():
            found["bias"] += buffer.numel() * name.endswith("expert_bias")
    return dict(found)


def _static(trainer: Trainer) -> dict[str, int]:
    """Bytes between steps, from the tensors themselves."""
    stages = [chunk.module for chunk in trainer.model]
    weights = _storages(tensor for stage in stages for tensor in (*stage.parameters(), *stage.buffers()))
    gradients = _storages(
        buffer.grad_data
        for chunk in trainer.model
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    )
    optimizers = [
        part.optimizer for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    ]
    masters = (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    moments = (t for optimizer in optimizers for state in optimizer.state.values() for t in state.values())
    averages = trainer.average.values if trainer.average is not None else []
    optimizer = _storages(tensor for tensor in (*masters, *moments, *averages) if torch.is_tensor(tensor))
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(
            size for key, size in optimizer.items() if key not in weights
        ),  # masters may be views
    }


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of each storage, once."""
    return {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}


@contextmanager
def _watched(recorder: Recorder, mode: Any, trainer: Trainer, report: RankReport) -> Iterator[None]:
    """Batches from the host, fused attention, and names for the phases of the step."""
    optimizer, transformer = trainer.optimizer, get_model_config(trainer.model[0])
    for name in ("prepare_grads", "get_grad_norm", "step"):
        setattr(optimizer, name, recorder.during("optimizer", getattr(optimizer, name)))
    transformer.finalize_model_grads_func = recorder.during(
        "gradients", transformer.finalize_model_grads_func
    )
    for objective in trainer.objectives.values():
        objective.loss = recorder.during("loss", objective.loss)  # type: ignore[method-assign]
        if isinstance(objective, Diffusion):
            objective.corrupt = half_masked
        if isinstance(objective, Preference):
            trainer.data = partial(_always, OneDocument(trainer.config.data.sequence_length, texts=SIDES))
            objective.mask = half_scored
            objective.scores = ReferenceScores({"": np.zeros((SIDES, trainer.config.preference.draws))})
    for model in (module for chunk in trainer.model for module in chunk.modules()):
        if isinstance(model, DynamicConcepts):
            R = model.settings.concepts.tokens_per_concept
            model.on_host = partial(every_concept, R, trainer.config.data.sequence_length)
    trainer.builder, trainer.onto_device = _Inline(), partial(_onto_device, recorder, mode)
    for chunk in trainer.model if trainer.config.layout.overlap_experts else ():
        model = get_attr_wrapped_model(chunk, "build_schedule_plan", return_model_obj=True)
        model.build_schedule_plan = recorder.during("forward", model.build_schedule_plan)
    forward, backward, gradients, weights = (
        partial(recorder.during, phase) for phase in ("forward", "backward", "gradients", "weights")
    )
    watch = fake_world.Watch(
        micro_batch=_first_forwards(recorder, trainer, report),
        forward=forward,
        backward=_then_collect(backward),
        gradients=gradients,
        weights=weights,
        resized=recorder.resized,
    )
    with fake_world.watched(watch), recorder.modules(trainer.model):
        yield


def _always(sequences: Any, step: int) -> Any:
    return sequences


class _Inline(Executor):
    """Does at once, and without this thread's modes, what another thread would do beside the model."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        done: Future[Any] = Future()
        with _disable_current_modes():
            done.set_result(function(*args, **options))
        return done


def _onto_device(recorder: Recorder, mode: Any, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """training.step.onto_device: what the host has made is as good as on a device, anew for each reader."""

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return mode.from_tensor(tensor.clone())  # of one tensor it gives the same fake one every time

    def next_batch() -> MicroBatch | None:
        with _disable_current_modes():
            batch = next(batches, None)
            return batch if batch is None or mode is None else batch.map(copied)

    return map(lambda batch: batch.map(recorder.seen), iter(next_batch, None))


def _first_forwards(recorder: Recorder, trainer: Trainer, report: RankReport) -> Callable[..., Any]:
    """Wraps what runs a micro-batch's forward: what the first one of each virtual stage leaves behind.

    Its output counts on the last stage alone, whose output is a loss: elsewhere it is freed when it is sent,
    and counts as the next stage's input. A forward pass before the step's own leaves nothing.
    """
    chunks: list[Any] = list(trainer.model)
    report.kept = [-1] * len(chunks)

    def wrap(run: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(run)

        def measured(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            model, backwards = given.get("model", given.get("f_model")), given.get("b_model")
            gc.collect()
            mark = recorder.mark()
            output, *others = run(*args, **kwargs)
            gc.collect()
            if model is None or backwards is not None or not torch.is_grad_enabled():
                return output, *others
            index = chunks.index(model)
            if report.kept[index] < 0:
                passed_on = _bytes(output) if tree_leaves(output)[0].dim() else 0
                report.kept[index] = recorder.since(mark) + _bytes(given["input_tensor"]) - passed_on
            return output, *others

        return measured

    return wrap


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))


def _then_collect(wrap: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        during = wrap(function)

        def collected(*args: Any, **kwargs: Any) -> Any:
            result = during(*args, **kwargs)
            gc.collect()
            return result

        return collected

    return wrapped


def main() -> None:
    """Answer the command line; see the top of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("stage")
    parser.add_argument("micro_batches", type=int)
    parser.add_argument("ranks", type=int, nargs="+")
    parser.add_argument("--count-only", action="store_true")
    args = parser.parse_args()
    config = load(args.config)
    stage = next(stage for stage in rules.schedule_of(config).stages if stage.name == args.stage)
    for rank in args.ranks:
        if args.count_only:
            report = count_parameters(config, rank)
        else:
            report = run_rank(config, stage, rank, args.micro_batches)
        print(json.dumps(asdict(report)), flush=True)


if __name__ == "__main__":
    main()
