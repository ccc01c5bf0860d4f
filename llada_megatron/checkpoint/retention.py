"""Which checkpoints of a run stay."""

from __future__ import annotations

import shutil
from pathlib import Path

from llada_megatron.checkpoint import publish
from llada_megatron.config.schema import CheckpointConfig
from llada_megatron.record.manifest import Manifest, readable
from llada_megatron.record.run_dir import RunDir


def retire(run_dir: Path, keep: CheckpointConfig) -> None:
    """Delete checkpoints that nothing keeps, and what crashes left half-written; one rank calls it.

    Kept are the newest `keep_last`, those at the end of a stage, at every multiple of `keep_every_steps`, and
    the `keep_best` with the lowest `best_metric`.
    """
    manifests = readable(run_dir)
    kept = set(list(manifests)[-max(keep.keep_last, 1) :])
    kept |= {path for path, manifest in manifests.items() if manifest.stage_ended}
    if keep.keep_every_steps:
        kept |= {path for path, manifest in manifests.items() if manifest.step % keep.keep_every_steps == 0}
    kept |= set(best(manifests, keep.best_metric, keep.keep_best))
    for path in manifests.keys() - kept:
        publish.remove(path)
    for left_behind in RunDir(run_dir).partial_checkpoints():
        shutil.rmtree(left_behind)


def best(manifests: dict[Path, Manifest], metric: str, count: int) -> list[Path]:
    """The `count` checkpoints with the lowest value of a metric, best first; those without it left out."""
    measured = [path for path in manifests if metric in manifests[path].metrics]
    return sorted(measured, key=lambda path: manifests[path].metrics[metric])[:count]
