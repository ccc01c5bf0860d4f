"""What `llada train --check` looks at besides the settings: what a start would refuse, as far as it shows.

It writes nothing. What takes seconds to import is imported when there is something for it to look at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llada_megatron.config.errors import BadInput, in_words
from llada_megatron.config.parameters import checkpoint_bytes
from llada_megatron.config.rules import schedule_of
from llada_megatron.config.schema import AttentionBackend, Config, LayerSpec
from llada_megatron.config.stage_settings import phases_of
from llada_megatron.record.manifest import Checkpoint, find, readable

NOT_CHECKED = (
    "GPUs and their memory (`llada plan`), other nodes and ports (training.preflight), every id of the data"
    " (`llada data inspect`), SHA-256 of checkpoints (`llada checkpoint verify`)"
)


class Findings:
    """What was looked at, what a start would refuse, and what could not be looked at because of that."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.checked: list[str] = []
        self.faults: list[str] = []
        self.unknown: list[str] = []
        with self._about("run.dir"):
            _check_directory(config)
        fingerprint = self._data()
        if config.model.attention_backend is not AttentionBackend.auto:
            with self._about("model.attention_backend"):
                from llada_megatron.training.start import attention_line

                attention_line(config)
        if config.model.layer_spec is not LayerSpec.auto:
            with self._about("model.layer_spec"):
                from llada_megatron.training.start import check_layers

                check_layers(config)
        with self._about("checkpoints"):
            _check_checkpoints(config, fingerprint)

    def _data(self) -> dict[str, Any] | None:
        """What a resume compares; None where the data cannot be used."""
        from llada_megatron.data.corpus import read_index
        from llada_megatron.data.shards import prefixes_of
        from llada_megatron.data.tokenizer import check_vocabulary

        data, model = self.config.data, self.config.model
        with self._about("data.tokenizer"):
            check_vocabulary(data.tokenizer, model.vocab_size)
        with self._about("data.path"):
            if not data.path:
                raise BadInput("data.path is empty: name the prefix of at least one .bin/.idx pair.")
            own = [entry for stage in self.config.schedule.stages for entry in stage.path]
            for entry in [*data.path, *own]:
                for prefix in prefixes_of(entry):
                    read_index(prefix)
        if not {"data.tokenizer", "data.path"} <= {*self.checked}:
            self.unknown = ["data.split", "whether a checkpoint's data is this one"]
            return None
        with self._about("data.split"):
            from llada_megatron.data.fingerprint import of_run
            from llada_megatron.data.packed import check_split, held_out, refuse_pairs

            schedule = schedule_of(self.config)
            objectives = {stage.name: stage.objective for stage in schedule.stages}
            for phase in phases_of(self.config, schedule):
                refuse_pairs(phase.data, {objectives[name] for name in phase.stages})
                check_split(phase.data, "train")
                for part in held_out(phase.data).values() if self.config.evaluation.block_sizes else ():
                    check_split(part, "validation")
            return of_run(self.config)
        return None

    @contextmanager
    def _about(self, subject: str) -> Iterator[None]:
        try:
            yield
        except BadInput as fault:
            self.faults.append(str(fault))
        except OSError as error:
            self.faults.append(f"{subject}: {in_words(error)}.")
        else:
            self.checked.append(subject)


def check(config: Config) -> None:
    """Print what was checked and what was not; BadInput with a sentence for each thing that is wrong."""
    found = Findings(config)
    unknown = [*found.unknown, NOT_CHECKED]
    print(f"\nchecked      the settings, {', '.join(found.checked)}", flush=True)
    print(f"not checked  {', '.join(unknown)}", flush=True)
    if found.faults:
        raise BadInput(" ".join(found.faults))


def _check_directory(config: Config) -> None:
    """Whether run.dir is, or can become, a folder with room for a checkpoint."""
    directory = Path(config.run.dir).absolute()
    there = next(path for path in (directory, *directory.parents) if path.exists())
    if not there.is_dir():
        raise BadInput(f"run.dir={config.run.dir} cannot be a folder: {there} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise BadInput(f"run.dir={config.run.dir} cannot be written: {there} lets this user write nothing.")
    averages = config.training.ema_decay > 0
    needed = checkpoint_bytes(config.model, config.precision, averages=averages)
    free = shutil.disk_usage(there).free
    if free < needed:
        raise BadInput(
            f"run.dir={config.run.dir} has {free:,} bytes free and one checkpoint takes {needed:,}: make room"
            " or choose another run.dir."
        )


def _check_checkpoints(config: Config, fingerprint: dict[str, Any] | None) -> None:
    """Whether the checkpoint that a start goes on from is there and belongs to this run."""
    checkpoint = _resumed(config)
    source = find(config.checkpoint.init_from) if config.checkpoint.init_from and not checkpoint else None
    if not (checkpoint or source or readable(Path(config.run.dir))):
        return
    from llada_megatron.training import position

    if checkpoint and fingerprint is not None:
        position.check_same_run(config, checkpoint.manifest, fingerprint)
    if source:
        position.check_same_model(config, source)
    position.check_nothing_later(Path(config.run.dir), checkpoint.manifest.step if checkpoint else 0)


def _resumed(config: Config) -> Checkpoint | None:
    """What run.resume selects, as training/position.py does, unless its files are damaged."""
    if config.run.resume == "never":
        return None
    if config.run.resume != "auto":
        return find(config.run.resume)
    return next(reversed(readable(Path(config.run.dir))), None)
