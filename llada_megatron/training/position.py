"""Where a run starts: from nothing, from another run's weights, or from its own newest checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from llada_megatron.checkpoint import publish, store
from llada_megatron.config.compose import differences, leaf_differences, model_of, resolve
from llada_megatron.config.errors import BadInput
from llada_megatron.config.rules import schedule_of
from llada_megatron.config.schema import Config
from llada_megatron.data.packed import fingerprint_difference
from llada_megatron.parallel.ranks import from_first_rank, warn
from llada_megatron.record.manifest import Checkpoint, Manifest, find, readable
from llada_megatron.record.run_dir import RunDir

MAY_CHANGE = (
    "run.resume",
    "run.dir",
    "run.name",
    "run.allow_change",
    "run.max_failures",
    "model.attention_backend",
    "model.layer_spec",
    "model.head_chunk_tokens",
    "data.path",
    "data.cache_dir",
    "schedule.stages",
    "layout.micro_batch",
    "layout.processes",
    "layout.tp",
    "layout.pp",
    "layout.vpp",
    "layout.cp",
    "layout.ep",
    "layout.etp",
    "layout.pipeline",
    "layout.dispatcher",
    "layout.recompute",
    "layout.overlap",
    "checkpoint.",
    "evaluation.",
    "training.",
    "logging.",
    "cluster.",
    "slurm.",
    "precision.deterministic",
)
"""Keys that a resume may change; data.path is covered by the fingerprint, stages by `_changed_stages`."""


TRAINING_OF_MODEL = (
    "model.attention_backend",
    "model.layer_spec",
    "model.head_chunk_tokens",
    "model.init_std",
    "model.expert_bias_update_rate",
    "model.expert_bias_zero_mean",
    "model.expert_balance_clean_half",
)
"""Keys of the model that say how it is trained, not what its weights compute."""


@dataclasses.dataclass
class Position:
    """What a run goes on from."""

    step: int = 0
    skipped_steps: int = 0
    wall_sec: float = 0.0
    autoregressive_tokens: int = 0
    """Data tokens of the model that the weights came from, when they came from another run."""


def resume_checkpoint(config: Config) -> Checkpoint | None:
    """The checkpoint that run.resume selects, its files verified; every rank calls it.

    `auto` takes the newest good one and renames damaged newer ones, with a warning. BadInput when a path
    is given that holds none, or a damaged one.
    """
    if config.run.resume == "never":
        return None
    if config.run.resume != "auto":
        return store.verified(from_first_rank(find, config.run.resume))
    for path in reversed(from_first_rank(RunDir(config.run.dir).whole_checkpoints)):
        try:
            return store.verified(from_first_rank(Checkpoint.read, path))
        except BadInput as damage:
            kept_as = publish.set_aside_damaged(path)
            warn(f"{damage} It is kept as {kept_as.name}; the run goes on from the one before it.")
    return None


def check_same_run(config: Config, manifest: Manifest, data_fingerprint: dict[str, Any]) -> None:
    """Raise BadInput when the checkpoint belongs to another model, objective, seed, order or data."""
    saved = config_of(manifest)
    allowed = (*MAY_CHANGE, *config.run.allow_change)
    changed = [line for line in differences(saved, config) if not line.startswith(allowed)]
    stages = _changed_stages(saved, config, manifest.step)
    changed += [line for line in stages if not line.startswith(tuple(config.run.allow_change))]
    if changed:
        raise BadInput(
            "The checkpoint belongs to another run: "
            + "; ".join(changed)
            + ". Put the settings back, name them in run.allow_change, or start anew with run.resume=never"
            " and another run.name."
        )
    if "data" in config.run.allow_change:
        return
    if data := fingerprint_difference(manifest.data_fingerprint, data_fingerprint):
        raise BadInput(
            f"The data changed since the checkpoint: {' '.join(data)} Set run.allow_change=[data] to go on."
        )


def check_same_model(config: Config, checkpoint: Checkpoint) -> None:
    """Raise BadInput when weights to start from are of a model that computes otherwise.

    Shapes alone would not tell: another rotary base, norm or mask token loads without an error.
    """
    # A key that came after the checkpoint has the value that its weights were made with, the default.
    saved = {"model": dataclasses.asdict(model_of(checkpoint.path, checkpoint.manifest.config))}
    now = {"model": OmegaConf.to_container(OmegaConf.structured(config.model), enum_to_str=True)}
    allowed = (*TRAINING_OF_MODEL, *config.run.allow_change)
    if changed := [line for line in leaf_differences(saved, now) if not line.startswith(allowed)]:
        raise BadInput(
            f"checkpoint.init_from={checkpoint.path} holds another model: {'; '.join(changed)}. Choose its"
            " model, or name the keys in run.allow_change."
        )


def check_nothing_later(run_dir: Path, step: int) -> None:
    """Raise BadInput when the run's directory holds checkpoints past the step that it starts from.

    They belong to a history that this start abandons: the next resume would pick one of them, and they
    would count as newer than what is saved from now on.
    """
    for checkpoint in readable(run_dir):
        if checkpoint.manifest.step > step:
            raise BadInput(
                f"{checkpoint.path} is later than step {step}, where run.resume starts: remove it and those"
                " after it, or choose another run.dir."
            )


def _changed_stages(saved: Config, now: Config, step: int) -> list[str]:
    """Stages that were trained, up to the one in progress, stay as they are; later ones are free."""
    in_progress = schedule_of(saved).stage_at(step - 1).index
    changed = []
    for index, before in enumerate(saved.schedule.stages[: in_progress + 1]):
        after = now.schedule.stages[index] if index < len(now.schedule.stages) else None
        if after is None or dataclasses.replace(after, micro_batch=before.micro_batch) != before:
            changed.append(f"schedule.stages[{index}] ({before.name}) has been trained and is another now")
    return changed


def config_of(manifest: Manifest) -> Config:
    """The configuration stored in a checkpoint."""
    return resolve(manifest.config)
