"""Where a run starts: from nothing, from another run's weights, or from its own newest checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llada_megatron.checkpoint import store
from llada_megatron.config.compose import differences
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
    "checkpoint.",
    "evaluation.",
    "training.",
    "logging.",
    "cluster.",
    "precision.deterministic",
)
"""Keys that a resume may change; data.path is covered by the fingerprint, later stages may be added."""


@dataclasses.dataclass
class Position:
    """What a run goes on from."""

    step: int = 0
    skipped_steps: int = 0
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
    done = [stage for stage in saved.schedule.stages if stage in config.schedule.stages]
    if manifest.step and saved.schedule.stages and not done:
        changed.append("schedule.stages: no stage of the checkpoint is left")
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
            "The data changed since the checkpoint: " + " ".join(data) + " Set data.allow_change=true to go on."
        )


def config_of(manifest: store.Manifest) -> Config:
    """The configuration stored in a checkpoint."""
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(OmegaConf.structured(Config), manifest.config)
    return OmegaConf.to_object(merged)  # type: ignore[return-value]
