"""When a run's checkpoints are written, and what their manifests say."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llada_megatron.checkpoint.copies import Copying
from llada_megatron.checkpoint.memory import Memory, Remembered
from llada_megatron.checkpoint.retention import retire
from llada_megatron.checkpoint.store import Save, Saver
from llada_megatron.config.compose import tree_of
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import Config
from llada_megatron.data.phases import PhasedData
from llada_megatron.parallel.ranks import warn
from llada_megatron.record import events
from llada_megatron.record.manifest import Manifest
from llada_megatron.record.run_dir import RunDir
from llada_megatron.runtime import device
from llada_megatron.training.position import Position
from llada_megatron.training.step import Trainer


class Saving:
    """Writes the checkpoints of a run, one at a time; every rank calls each method at the same step."""

    def __init__(
        self,
        config: Config,
        trainer: Trainer,
        data_fingerprint: dict[str, Any],
        data: PhasedData,
        carried_along: Mapping[str, bytes],
    ) -> None:
        """carried_along: what came with the weights that the run started from, in every checkpoint of it."""
        self.config, self.trainer, self.fingerprint, self.data = config, trainer, data_fingerprint, data
        self.carried_along = carried_along
        asked = config.checkpoint.in_background
        self.in_background = device.on_cuda() if asked is None else asked
        self._saver = Saver(threads=config.checkpoint.writer_threads, in_background=self.in_background)
        self._copying = (
            Copying(Path(config.run.dir), config.checkpoint) if config.checkpoint.copy_to else None
        )
        self._memory = self._opened_memory()
        self._said_no_memory = False
        self._pending: Save | None = None
        self._began = 0.0
        self.longest_sec = 0.0
        """Of a whole save, from its capture until it was published."""

    def is_due(self, step: int, *, stage_ended: bool, is_last: bool) -> bool:
        """Whether the configuration asks for a checkpoint after `step` steps."""
        checkpoint = self.config.checkpoint
        at_stage_end = stage_ended and checkpoint.at_stage_end
        return bool(
            at_stage_end or is_last or (checkpoint.every_steps and step % checkpoint.every_steps == 0)
        )

    def is_memory_due(self, step: int) -> bool:
        """Whether the configuration asks for a copy in memory after `step` steps."""
        every = self.config.checkpoint.memory_every_steps
        return bool(every and step % every == 0)

    def save(
        self, step: int, stage: Stage, position: Position, wall_sec: float, metrics: dict[str, float]
    ) -> None:
        """Save after `step` steps; in the background it returns when everything is captured."""
        self._publish()
        self._began = began = time.monotonic()
        self._begin(step, self._manifest(step, stage, position, wall_sec, metrics), None)
        if dist.get_rank() == 0:
            events.append(Path(self.config.run.dir), "saved", step=step, seconds=time.monotonic() - began)

    def remember(
        self, step: int, stage: Stage, position: Position, wall_sec: float, metrics: dict[str, float]
    ) -> None:
        """Keep a copy in the nodes' memory, unless a checkpoint is still being written."""
        self.poll()
        if self._pending is None:
            self._began = time.monotonic()
            self._begin(step, self._manifest(step, stage, position, wall_sec, metrics), self._memory)

    def _begin(self, step: int, manifest: Manifest, memory: Memory | None) -> None:
        self._pending = self._saver.save(
            memory.path(step) if memory else RunDir(self.config.run.dir).checkpoint(step),
            manifest,
            self.trainer.model,
            self.trainer.optimizer,
            carried_along=self.carried_along,
            average=self.trainer.average,
            made_by=memory.save if memory else None,
        )
        if not self.in_background:
            self._publish()

    def _manifest(
        self, step: int, stage: Stage, position: Position, wall_sec: float, metrics: dict[str, float]
    ) -> Manifest:
        return Manifest(
            config=tree_of(self.config),
            step=step,
            consumed_samples=self.trainer.schedule.samples_before(step),
            consumed_tokens=self.trainer.schedule.tokens_before(step),
            global_batches=[list(part) for part in self.trainer.schedule.batches],
            stage=stage.name,
            block_size=stage.block_size,
            stage_ended=step == stage.end_step,
            skipped_steps=position.skipped_steps,
            skipped_lately=list(position.skips.steps),
            left_out_lately=list(position.skips.samples),
            losses_lately=list(self.trainer.spikes.losses),
            grad_norms_lately=list(self.trainer.spikes.grad_norms),
            rollbacks=list(position.rollbacks),
            wall_sec=wall_sec,
            autoregressive_tokens=position.autoregressive_tokens,
            metrics=metrics,
            data_fingerprint=self.fingerprint | self._identities(),
            data_read=self.data.read_before(step),
        )

    def _opened_memory(self) -> Memory | None:
        settings = self.config.checkpoint
        if not settings.memory_every_steps:
            return None
        memory = Memory(Path(self.config.run.dir), settings.memory_dir)
        if self.config.run.resume != "auto":  # they belong to a history that this start abandons
            memory.drop()
        return memory

    def _identities(self) -> dict[str, Any]:
        """What objectives read besides the data, by their names; nothing where none reads anything."""
        found = {name: each.identity for name, each in self.trainer.objectives.items() if each.identity}
        return {"objectives": found} if found else {}

    def poll(self) -> None:
        """Publish what the background has written meanwhile, and commit what it has copied."""
        if self._pending is not None and self._pending.is_written():
            self._publish()
        if self._copying is not None and self._copying.is_busy and self._copying.is_copied():
            self._copying.finish()

    def finish(self, *, copies: bool = True) -> None:
        """Wait for what is being written and, unless there is no time for `copies`, for what is copied."""
        self._publish()
        if copies and self._copying is not None:
            self._copying.finish()

    def _publish(self) -> None:
        """Wait for the checkpoint that is being written, publish it, retire old ones, and begin its copy."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if isinstance(pending, Remembered):
            self._commit(pending)
            return
        if self._copying is not None:
            self._copying.finish()  # of the one before, which may be retired now
        pending.publish()
        took = time.monotonic() - self._began
        self.longest_sec = max(self.longest_sec, took)
        if dist.get_rank() == 0:
            may_go_back = self.config.training.max_rollbacks > 0
            retire(Path(self.config.run.dir), self.config.checkpoint, may_go_back=may_go_back)
            if self.in_background:
                events.append(
                    Path(self.config.run.dir), "published", step=pending.manifest.step, seconds=took
                )
        dist.barrier()
        if self._memory is not None:  # what it holds is older
            self._memory.drop()
        if self._copying is not None:
            self._copying.begin(pending.final)

    def _commit(self, copy: Remembered) -> None:
        """Finish a copy in memory; the run goes on where that fails."""
        why = ""
        try:
            copy.publish()
        except OSError as error:  # on every rank alike
            why = str(error)
        if why and not self._said_no_memory:
            warn(f"{why}. Make room in checkpoint.memory_dir, or set checkpoint.memory_every_steps=0.")
            self._said_no_memory = True
        if dist.get_rank() == 0:
            step, run_dir = copy.manifest.step, Path(self.config.run.dir)
            if why:
                events.append(run_dir, "not_remembered", step=step, why=why)
            else:
                took = time.monotonic() - self._began
                events.append(run_dir, "remembered", step=step, seconds=took)
