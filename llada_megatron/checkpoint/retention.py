"""Which checkpoints of a run stay."""

from __future__ import annotations

import shutil
from pathlib import Path

from llada_megatron.checkpoint import publish
from llada_megatron.config.schema import CheckpointConfig
from llada_megatron.record.manifest import Checkpoint, readable
from llada_megatron.record.run_dir import RunDir


def retire(run_dir: Path, keep: CheckpointConfig, *, may_go_back: bool = False) -> None:
    """Delete checkpoints that nothing keeps, and what crashes left half-written; one rank calls it."""
    for path in unkept(readable(run_dir), keep, may_go_back=may_go_back):
        publish.remove(path)
    for left_behind in RunDir(run_dir).partial_checkpoints():
        shutil.rmtree(left_behind)


def unkept(checkpoints: list[Checkpoint], keep: CheckpointConfig, *, may_go_back: bool = False) -> set[Path]:
    """Those of a run's checkpoints, oldest first, that nothing keeps.

    Kept are the newest `keep_last`, those at the end of a stage, at every multiple of `keep_every_steps`, the
    `keep_best` with the lowest `best_metric`, and the one that a run would go back to if it may.
    """
    kept = checkpoints[-max(keep.keep_last, 1) :]
    if may_go_back and checkpoints:
        now = checkpoints[-1].manifest
        kept += from_before(checkpoints, min([now.step, *now.skipped_lately]), now.rollbacks)[-1:]
    kept += [each for each in checkpoints if each.manifest.stage_ended]
    if keep.keep_every_steps:
        kept += [each for each in checkpoints if each.manifest.step % keep.keep_every_steps == 0]
    kept += best(checkpoints, keep.best_metric, keep.keep_best)
    return {each.path for each in checkpoints} - {each.path for each in kept}


def from_before(checkpoints: list[Checkpoint], step: int, rollbacks: list[list[int]]) -> list[Checkpoint]:
    """Those of a run's checkpoints that are of at most `step` steps and whose weights it has not given up.

    rollbacks: of the manifest: a checkpoint between the two steps of one holds weights that were given up.
    """
    return [
        each
        for each in checkpoints
        if each.manifest.step <= step
        and not any(first < each.manifest.step < last for first, last in rollbacks)
    ]


def best(checkpoints: list[Checkpoint], metric: str, count: int) -> list[Checkpoint]:
    """The `count` checkpoints with the lowest value of a metric, best first; those without it left out."""
    measured = [each for each in checkpoints if metric in each.manifest.metrics]
    return sorted(measured, key=lambda each: each.manifest.metrics[metric])[:count]
