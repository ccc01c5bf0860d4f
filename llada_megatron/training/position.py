"""Where a run starts: from nothing, from another run's weights, or from its own newest checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llada_megatron.checkpoint import store
from llada_megatron.config.compose import differences
from llada_megatron.config.rules import schedule_of
from llada_megatron.config.schema import Config
from llada_megatron.data.packed import fingerprint_difference

MAY_CHANGE = (
    "run.resume",
    "run.dir",
    "run.name",
    "model.attention_backend",
    "model.layer_spec",
    "model.head_chunk_tokens",
    "data.path",
    "data.cache_dir",
    "data.allow_change",
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
    "precision.deterministic",
)
"""Keys that a resume may change; data.path is covered by the fingerprint, stages by `_changed_stages`."""


@dataclasses.dataclass
class Position:
    """What a run goes on from."""

    step: int = 0
    skipped_steps: int = 0
    wall_sec: float = 0.0
    autoregressive_tokens: int = 0
    """Data tokens of the model that the weights came from, when they came from another run."""


def resume_checkpoint(config: Config) -> Path | None:
    """The checkpoint that run.resume selects; ValueError when a path is given that holds none."""
    if config.run.resume == "never":
        return None
    if config.run.resume == "auto":
        whole = store.whole_checkpoints(Path(config.run.dir))
        return whole[-1] if whole else None
    return store.find(config.run.resume)


def check_same_run(config: Config, manifest: store.Manifest, data_fingerprint: dict[str, Any]) -> None:
    """Raise ValueError when the checkpoint belongs to another model, objective, seed, order or data."""
    saved = config_of(manifest)
    changed = [line for line in differences(saved, config) if not line.startswith(MAY_CHANGE)]
    changed += _changed_stages(saved, config, manifest.step)
    if changed:
        raise ValueError(
            "The checkpoint belongs to another run: "
            + "; ".join(changed)
            + ". Put the settings back, or start anew with run.resume=never and another run.name."
        )
    if config.data.allow_change:
        return
    if data := fingerprint_difference(manifest.data_fingerprint, data_fingerprint):
        raise ValueError(
            f"The data changed since the checkpoint: {' '.join(data)} Set data.allow_change=true to go on."
        )


def check_nothing_later(run_dir: Path, step: int) -> None:
    """Raise ValueError when the run's directory holds checkpoints past the step that it starts from.

    They belong to a history that this start abandons: the next resume would pick one of them, and they
    would count as newer than what is saved from now on.
    """
    for checkpoint in store.whole_checkpoints(run_dir):
        if store.Manifest.read(checkpoint).step > step:
            raise ValueError(
                f"{checkpoint} is later than step {step}, where run.resume starts: remove it and those after"
                " it, or choose another run.dir."
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


def config_of(manifest: store.Manifest) -> Config:
    """The configuration stored in a checkpoint."""
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(OmegaConf.structured(Config), manifest.config)
    return OmegaConf.to_object(merged)  # type: ignore[return-value]
