"""The life of one rank: build, find the position, train stage by stage, checkpoint, evaluate."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.utils import get_model_config

from llada_megatron.checkpoint import store
from llada_megatron.config import rules
from llada_megatron.config.choices import BadSamples
from llada_megatron.config.compose import model_of, save
from llada_megatron.config.errors import RunFailed
from llada_megatron.config.flops import mfu, peak_flops
from llada_megatron.config.ranges import spans_of
from llada_megatron.config.schedule import Schedule, Stage
from llada_megatron.config.schema import Config, TrainingConfig
from llada_megatron.config.stage_settings import at_stage
from llada_megatron.data.fingerprint import of_this_node
from llada_megatron.data.packed import check_split, held_out
from llada_megatron.data.phases import PhasedData
from llada_megatron.data.tokenizer import check_vocabulary
from llada_megatron.evaluate.likelihood import Evaluator, checkpoint_metrics
from llada_megatron.evaluate.samples import infilled
from llada_megatron.guard.agreement import check_agreement
from llada_megatron.guard.exclusive import LINGER_SEC, only_training_of
from llada_megatron.guard.preflight import check_nodes
from llada_megatron.guard.signals import StopRequest
from llada_megatron.guard.stragglers import Stragglers
from llada_megatron.guard.timeouts import fitted
from llada_megatron.guard.watchdog import Watchdog
from llada_megatron.model.adapters import is_adapter
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.observe.trackers import Trackers
from llada_megatron.parallel import groups
from llada_megatron.parallel.dealing import Deal, sample_indices
from llada_megatron.parallel.ranks import from_first_rank, gathered, warn
from llada_megatron.record import carried, events
from llada_megatron.record.manifest import Checkpoint, find
from llada_megatron.record.metrics import read_jsonl
from llada_megatron.record.outcome import Outcome
from llada_megatron.record.pace import Pace, pace_of
from llada_megatron.record.run_dir import RunDir
from llada_megatron.runtime import device, garbage
from llada_megatron.runtime.launch import in_slurm_job
from llada_megatron.training.expert_rows import RowsAlarm
from llada_megatron.training.out_of_memory import MemoryFaults, OutOfMemory
from llada_megatron.training.position import (
    Position,
    batch_change,
    check_nothing_later,
    check_same_model,
    check_same_place,
    check_same_run,
    resume_checkpoint,
)
from llada_megatron.training.profiling import Profiling
from llada_megatron.training.rollback import go_back, restore
from llada_megatron.training.saving import Saving
from llada_megatron.training.start import attention_line, engine_lines
from llada_megatron.training.step import StepResult, Trainer, assemble, open_stage, train_step, use_stage

TRAIN_LOSS_STEPS = 20
"""The train loss of a stage is the mean of its last steps."""


def run(
    config: Config,
    *,
    deal: Deal = sample_indices,
    on_batch: Callable[[list[int], MicroBatch], None] | None = None,
) -> Outcome:
    """Train this rank's part of a run to its end, or to a signal.

    deal, on_batch: of Trainer, for whoever keeps a journal of a run (verify/journal.py).
    Raises BadInput for settings, data or checkpoints that do not fit, and RunFailed when too many
    steps were skipped for non-finite losses or gradients.
    """
    rules.check(config)
    device.seed_everything(config.run.seed, config.precision.deterministic)
    training = config.training
    groups.join(
        config.layout,
        threads=training.threads,
        bind=training.bind_cores,
        timeout_sec=training.collective_timeout_sec,
    )
    watchdog = Watchdog(
        Path(config.run.dir),
        dist.get_rank(),
        hang_timeout_sec=training.hang_timeout_sec,
        stop_deadline_sec=training.stop_deadline_sec,
    )
    stop = StopRequest(watchdog.stop_was_asked)  # before the model is built, which may take minutes
    try:
        data_fingerprint = of_this_node(config)
        check_agreement(config, data_fingerprint)
        if training.preflight:
            check_nodes(config)
        watchdog.start()  # writes to run.dir, whose faults the preflight names with their node
        pace = from_first_rank(pace_of, Path(config.run.dir))
        groups.initialize(config.layout, timeout_sec=keep_time(training, pace, watchdog))
        attention_line(config)  # before the model is built, which may take minutes
        lingering_sec = LINGER_SEC if in_slurm_job() else 0.0
        with only_training_of(Path(config.run.dir), wait_sec=lingering_sec):
            if number := stop.agreed():  # before the model is built, which may take minutes
                outcome = stopped_at_start(config, number, is_writer=dist.get_rank() == 0)
            else:
                training_run = _Run(config, data_fingerprint, watchdog, pace)
                training_run.trainer.deal, training_run.trainer.on_batch = deal, on_batch
                with garbage.by_hand(training.collect_garbage_every_steps):
                    outcome = training_run.train(stop)
        if outcome.signal:  # a launcher ends the others when the first one leaves with the signal's exit code
            dist.barrier()
        return outcome
    finally:
        stop.release()
        watchdog.close()
        groups.destroy()


def stopped_at_start(config: Config, number: int, *, is_writer: bool = True) -> Outcome:
    """What became of a start that a signal ended before it trained."""
    step = RunDir(config.run.dir).newest_step()
    if is_writer:
        events.append(Path(config.run.dir), "signalled", step=step, signal=signal.Signals(number).name)
    return Outcome(step, rules.schedule_of(config).total_steps, number, finished=False)


def keep_time(settings: TrainingConfig, pace: Pace, watchdog: Watchdog) -> float:
    """Raise the limits that a save of this run may pass, and say so; returns that of messages, in seconds."""
    timeouts, raised = fitted(settings, pace)
    watchdog.allow(hang_timeout_sec=timeouts.hang_timeout_sec, stop_deadline_sec=timeouts.stop_deadline_sec)
    groups.wait_longer(timeouts.collective_timeout_sec)
    if raised and dist.get_rank() == 0:
        print("\n".join(raised), flush=True)
    return timeouts.collective_timeout_sec


def open_data(config: Config, schedule: Schedule, *, step: int = 0) -> PhasedData:
    """The sequences of a run that goes on with a step."""
    check_vocabulary(config.data.tokenizer, config.model.vocab_size)
    refuse_ids = config.training.bad_samples is BadSamples.refuse
    return PhasedData(config, schedule, step=step, refuse_ids=refuse_ids)


def build_trainer(config: Config, schedule: Schedule) -> Trainer:
    """Data, model, optimizer and schedules of this rank, at the start of a run."""
    return assemble(config, schedule, open_data(config, schedule).at)


class _Run:
    def __init__(
        self, config: Config, data_fingerprint: dict[str, Any], watchdog: Watchdog, pace: Pace
    ) -> None:
        self.config, self.watchdog, self.pace = config, watchdog, pace
        self.files = RunDir(config.run.dir)
        self.dir = self.files.path
        self.is_writer = dist.get_rank() == 0
        self.fingerprint = data_fingerprint
        checkpoint = resume_checkpoint(config)
        if checkpoint is not None:
            check_same_run(config, checkpoint.manifest, data_fingerprint)
        check_nothing_later(self.dir, checkpoint.manifest.step if checkpoint else 0)
        batches = checkpoint.manifest.batches(config.layout.global_batch) if checkpoint else ()
        self.schedule = rules.schedule_of(config, batches)
        self.data = open_data(config, self.schedule, step=checkpoint.manifest.step if checkpoint else 0)
        if checkpoint is not None:
            check_same_place(checkpoint.manifest, self.data)
        self.trainer = assemble(config, self.schedule, self.data.at)
        if self.is_writer:
            print("\n".join(engine_lines(config, get_model_config(self.trainer.model[0]))), flush=True)
        self.carried_along: dict[str, bytes] = {}
        self.position = self._load(checkpoint)
        self._open_stage()
        self.stragglers = Stragglers(config, get_model_config(self.trainer.model[0]))
        self.saving = Saving(self.config, self.trainer, data_fingerprint, self.data, self.carried_along)
        self.rows_alarm = RowsAlarm(config.training.expert_rows_alarm)
        self.profiling = Profiling(self.dir, self.trainer)
        self.memory = MemoryFaults(config, self.trainer.model)
        self.passed_over = spans_of(config.training.skip_samples)
        self.step_sec = 0.0  # of the last step of this attempt
        self.replayed = 0
        self.metrics: dict[str, float] = {}  # of the evaluation at the present step
        self.evaluator: Evaluator | None = None
        self._check_held_out()
        self.trackers = None
        if self.is_writer:
            self.dir.mkdir(parents=True, exist_ok=True)
            recorded = read_jsonl(self.files.metrics, "step")
            self.replayed = max(0, recorded[-1]["step"] + 1 - self.position.step) if recorded else 0
            save(self.config, self.files.config)  # a start that is refused has left the old one
            self.trackers = Trackers(self.dir, config.logging, config.run.name, self.position.step)
        self.started = time.monotonic()

    def train(self, stop: StopRequest) -> Outcome:
        """Steps, with what surrounds them: evaluation, checkpoints, signals."""
        config, step = self.config, self.position.step
        last_step = self.schedule.total_steps
        if config.training.steps:
            last_step = min(last_step, config.training.steps)
        signal_number = stop.agreed()
        try:
            if step == 0 and config.checkpoint.init_from and not signal_number:
                self._evaluate(0, None)
            while step < last_step and not signal_number:
                stage = self.schedule.stage_at(step)
                self.profiling.begin(step)
                if not self._passes_over(step):
                    self._learn(step, stage)
                step += 1
                self.profiling.end(step)
                self.watchdog.beat()
                signal_number, self.profiling.is_due = stop.agreed_with(self.profiling.is_asked())
                ended = step == stage.end_step
                self.metrics = {}
                # Evaluated before it is saved: the manifest holds the figures, a resume finds them on record.
                every = config.evaluation.every_steps
                if (ended and config.evaluation.at_stage_end) or (every and step % every == 0):
                    began = time.monotonic()
                    self._evaluate(step, stage)
                    self._record("evaluated", step=step, seconds=time.monotonic() - began)
                self.watchdog.beat()
                is_due = self.saving.is_due(step, stage_ended=ended, is_last=step == last_step)
                if is_due or signal_number or self._went_back_at(step):
                    self.saving.save(step, stage, self.position, self._wall_sec(), self.metrics)
                elif self.saving.is_memory_due(step):
                    self.saving.remember(step, stage, self.position, self._wall_sec(), self.metrics)
                else:
                    self.saving.poll()
                self.watchdog.beat()
                self._keep_time()
                garbage.collect(step, config.training.collect_garbage_every_steps)
            self.saving.finish(copies=not signal_number)
            if step >= last_step:
                self._check_trained(step)
            if signal_number:
                self._record("signalled", step=step, signal=signal.Signals(signal_number).name)
        except RunFailed as failure:
            if not isinstance(failure, OutOfMemory):
                self.saving.finish()  # every rank raises it alike
            raise
        finally:
            self.profiling.close()
            if self.trackers is not None:
                self.trackers.close()
        return Outcome(step, self.schedule.total_steps, signal_number, finished=step >= last_step)

    def _passes_over(self, step: int) -> bool:
        """Whether training.skip_samples leaves out a step; the rate and the place in the data move on."""
        first, end = (self.schedule.samples_before(each) for each in (step, step + 1))
        if not any(each.start < end and first < each.stop for each in self.passed_over):
            return False
        open_stage(self.trainer, step)
        self._record("passed_over", step=step, samples=[first, end - 1])
        return True

    def _learn(self, step: int, stage: Stage) -> None:
        self.stragglers.begin(step)
        began = device.seconds()
        with self.memory.explained(self.schedule, stage, step):
            result = train_step(self.trainer, step)
        if not self.step_sec:
            self._record("first_step", step=step, replayed=self.replayed)
        self.step_sec = device.seconds() - began
        self._log(step, stage, result, self.step_sec)
        self.stragglers.report(step)
        if hot := self.rows_alarm.raised(self.trainer.rows, result.expert_rows_max_over_mean, step):
            warn(hot[0])
            self._record("hot_experts", **hot[1])
        self._count_skipped(step, stage, result)

    def _keep_time(self) -> None:
        """After a save that took longer than any before, see to it that the next one can end."""
        if self.saving.longest_sec > self.pace.save_sec:
            self.pace = Pace(max(self.pace.step_sec, self.step_sec), self.saving.longest_sec)
            keep_time(self.config.training, self.pace, self.watchdog)

    def _load(self, checkpoint: Checkpoint | None) -> Position:
        """Load weights and return the run's place: that of its own checkpoint, or its start."""
        if checkpoint is not None:
            manifest, position = checkpoint.manifest, restore(self.trainer, checkpoint)
            for name, identity in manifest.data_fingerprint.get("objectives", {}).items():
                if name in self.trainer.objectives:
                    self.trainer.objectives[name].identity = identity
            self._keep(checkpoint, manifest.config.get("checkpoint", {}).get("init_from", ""))
            if (change := batch_change(self.schedule, manifest)) and self.is_writer:
                print(change[0], flush=True)
                self._record("global_batch", **change[1])
            return position
        if self.config.checkpoint.init_from:
            checkpoint = store.verified(
                from_first_rank(find, self.config.checkpoint.init_from), weights_alone=True
            )
            check_same_model(self.config, checkpoint)
            had_adapters = model_of(checkpoint.path, checkpoint.manifest.config_of_weights).lora.rank > 0
            keep = None if had_adapters else is_adapter
            store.load(checkpoint.path, self.trainer.model, None, keep=keep)
            self.trainer.optimizer.reload_model_params()
            if self.trainer.average is not None:
                self.trainer.average.restart()
            self._keep(checkpoint, str(checkpoint.path.absolute()))
            return Position(autoregressive_tokens=checkpoint.manifest.consumed_tokens)
        return Position()

    def _open_stage(self) -> None:
        """Let the objective that goes on refuse what does not fit before this start has written anything."""
        stage = self.schedule.stage_at(self.position.step)
        use_stage(self.trainer, stage)
        if self.position.step < self.schedule.total_steps:
            self.trainer.objectives[stage.objective].open(stage)

    def _check_held_out(self) -> None:
        """Refuse at the start what an evaluation of this stage or of a later one could not read."""
        if not self.config.evaluation.block_sizes:
            return
        stages = [stage for stage in self.schedule.stages if stage.end_step > self.position.step]
        for data in {repr(own): own for own in (self._at(stage).data for stage in stages)}.values():
            for part in held_out(data).values():
                from_first_rank(check_split, part, "validation")
        self._evaluator_of(self.schedule.stage_at(self.position.step))

    def _at(self, stage: Stage) -> Config:
        return at_stage(self.config, stage.index)

    def _evaluator_of(self, stage: Stage) -> Evaluator | None:
        """Of what is held out of the data of a stage, at its L; every rank calls it."""
        if not self.config.evaluation.block_sizes:
            return None
        config = self._at(stage)
        if self.evaluator is None or self.evaluator.config.data != config.data:
            self.evaluator = Evaluator(config, list(self.trainer.model))
        return self.evaluator

    def _keep(self, checkpoint: Checkpoint, origin: str) -> None:
        """Keep, for the checkpoints to come, what came with the weights, and where they came from."""
        self.carried_along = carried.content_of(checkpoint) if self.is_writer else {}
        self.config = replace(self.config, checkpoint=replace(self.config.checkpoint, init_from=origin))

    def _record(self, event: str, **fields: Any) -> None:
        if self.is_writer:
            events.append(self.dir, event, **fields)

    def _wall_sec(self) -> float:
        return self.position.wall_sec + time.monotonic() - self.started

    def _count_skipped(self, step: int, stage: Stage, result: StepResult) -> None:
        """Count and record what the step left out; RunFailed, on every rank, when it is too much."""
        settings, skips = self.config.training, self.position.skips
        if settings.bad_samples is BadSamples.skip:
            objective = self.trainer.objectives[stage.objective]
            found = {index: why for part in gathered(objective.left_out) for index, why in part.items()}
            objective.left_out.clear()
            if found:
                sequences = sorted(found)
                why = [found[index] for index in sequences]
                self._record("left_out", step=step, sequences=sequences, why=why)
                skips.add_samples(settings, step, why)
        if result.skipped:
            self.position.skipped_steps += 1
            first, end = (self.schedule.samples_before(each) for each in (step, step + 1))
            if result.spike:
                self._record("spike", step=step, samples=[first, end - 1], why=result.spike)
            try:
                skips.add_step(settings, step, range(first, end), result.spike)
            except RunFailed as failure:
                self._go_back(step + 1, failure)

    def _went_back_at(self, step: int) -> bool:
        """Whether the run took earlier weights after so many steps; a checkpoint keeps that."""
        return any(at == step for _, at in self.position.rollbacks)

    def _go_back(self, step: int, failure: RunFailed) -> None:
        """Give up what was learnt lately, after `step` steps, or raise the failure, on every rank."""
        self.saving.finish()
        self.position = go_back(self.trainer, self.position, step, failure)
        to, _ = self.position.rollbacks[-1]
        first, end = (self.schedule.samples_before(each) for each in (to, step))
        self._record("rolled_back", step=step, to=to, samples=[first, end - 1], why=str(failure))
        warn(
            f"step {step}: took the weights of step {to}, passed over samples {first} to {end - 1}. {failure}"
        )
        if self.trackers is not None:
            self.trackers.go_back(to)

    def _check_trained(self, step: int) -> None:
        if step and self.position.skipped_steps == step:
            raise RunFailed(
                f"Every one of the {step} steps was skipped for a non-finite loss or gradient, or for want of"
                " good samples: nothing was learnt. Lower optimizer.lr, or look at the data and the weights."
            )

    def _log(self, step: int, stage: Stage, result: StepResult, seconds: float) -> None:
        if self.trackers is None:
            return
        tokens_per_sec = self.schedule.tokens_of(step) / seconds
        record = asdict(result)
        del record["skipped"], record["spike"]
        record |= record.pop("figures") | record.pop("watched")
        self.trackers.log(
            {
                "step": step,
                "consumed_samples": self.schedule.samples_before(step + 1),
                "consumed_tokens": self.schedule.tokens_before(step + 1),
                "global_batch": stage.global_batch,
                "sequence_length": stage.sequence_length,
                "stage": stage.name,
                "objective": stage.objective,
                "block_size": stage.block_size,
                **record,
                "tokens_per_sec": tokens_per_sec,
                "mfu": self._mfu(stage, tokens_per_sec),
                "peak_memory_bytes": device.peak_memory_bytes(),
                "reserved_memory_bytes": device.reserved_memory_bytes(),
                "skipped_steps": self.position.skipped_steps + int(result.skipped),
            }
        )

    def _mfu(self, stage: Stage, tokens_per_sec: float) -> float | None:
        if not peak_flops(self.config.cluster, self.config.precision.dtype):
            return None
        return mfu(self.config, stage, tokens_per_sec, devices=self.config.layout.processes)

    def _evaluate(self, step: int, stage: Stage | None) -> None:
        """Evaluate after a stage, or (stage None) the weights that a conversion starts from."""
        evaluator = self._evaluator_of(stage or self.schedule.stages[0])
        if evaluator is None:
            return
        is_diffusion = stage is not None and not stage.geometry.causal
        autoregressive = None
        if not is_diffusion:
            tokens = self.position.autoregressive_tokens + self.schedule.tokens_before(step)
            estimate = evaluator.autoregressive()
            autoregressive = {"nll": estimate.pop("mean"), **estimate, "tokens": tokens}
        bounds = evaluator.bounds() if is_diffusion or stage is None else {}
        self.metrics = checkpoint_metrics(bounds, autoregressive)
        record = {
            "step": step,
            "consumed_tokens": self.schedule.tokens_before(step),
            "stage": stage.name if stage else "init",
            "objective": stage.objective if stage else "autoregressive",
            "block_size": stage.block_size if stage else 1,
            "sequence_length": evaluator.config.data.sequence_length,
            "stage_tokens": stage.tokens if stage else 0,
            "train_loss": self._train_loss(stage),
            "bound": bounds,
            "ar": autoregressive,
            "block1_views": evaluator.block_one_views() if stage is None else None,
            "baselines": evaluator.baselines,
            "vocab_size": self.config.model.vocab_size,
            "wall_sec": self._wall_sec(),
        }
        if stage is not None:
            objective = self.trainer.objectives[stage.objective]
            held_out = objective.held_out(self.trainer.model, evaluator.samples, stage)
            if self.config.evaluation.planted_share:
                held_out = {**held_out, **evaluator.planted(stage.block_size)}
            if held_out:
                record["held_out"] = held_out
        if self.trackers is not None:
            self.trackers.evaluation(record)
        if stage is not None and is_diffusion:
            self._infill(step, stage, evaluator)

    def _infill(self, step: int, stage: Stage, evaluator: Evaluator) -> None:
        chosen = evaluator.samples[: self.config.evaluation.infill_sequences]
        if not chosen:  # a decoder refuses layouts that an evaluation of the bound serves
            return
        model = self.trainer.model[0]
        for sample in infilled(evaluator.config, model, chosen, stage.block_size):
            if self.trackers is not None:
                self.trackers.sample(
                    {"step": step, "stage": stage.name, "block_size": stage.block_size, **sample}
                )

    def _train_loss(self, stage: Stage | None) -> float | None:
        if stage is None or not self.is_writer:
            return None
        losses = [
            record["loss"]
            for record in read_jsonl(self.files.metrics, "stage", "loss")
            if record["stage"] == stage.name and record["loss"] is not None
        ][-TRAIN_LOSS_STEPS:]
        return sum(losses) / len(losses) if losses else None
