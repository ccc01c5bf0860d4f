"""Which checkpoints of a run stay."""

from __future__ import annotations

import shutil
from pathlib import Path

from llada_megatron.checkpoint import publish
from llada_megatron.config.schema import CheckpointConfig
from llada_megatron.record.manifest import Checkpoint, readable
from llada_megatron.record.run_dir import RunDir


def retire(run_dir: Path, keep: CheckpointConfig, *, may_go_back: bool = False) -> None:
    """Delete checkpoints that nothing keeps, and what crashes left half-written; one rank calls it.

    Kept are the newest `keep_last`, those at the end of a stage, at every multiple of `keep_every_steps`, the
    `keep_best` with the lowest `best_metric`, and the one that a run would go back to if it may.
    """
    checkpoints = readable(run_dir)
    kept = checkpoints[-max(keep.keep_last, 1) :]
    if may_go_back and checkpoints:
        now = checkpoints[-1].manifest
        kept += from_before(run_dir, min([now.step, *now.skipped_lately]), now.rollbacks)[-1:]
    kept += [each for each in checkpoints if each.manifest.stage_ended]
    if keep.keep_every_steps:
        kept += [each for each in checkpoints if each.manifest.step % keep.keep_every_steps == 0]
    kept += best(checkpoints, keep.best_metric, keep.keep_best)
    for path in {each.path for each in checkpoints} - {each.path for each in kept}:
        publish.remove(path)
    for left_behind in RunDir(run_dir).partial_checkpoints():
        shutil.rmtree(left_behind)


def from_before(run_dir: Path, step: int, rollbacks: list[list[int]]) -> list[Checkpoint]:
    """Checkpoints of a run after at most `step` steps, oldest first, without those whose weights it gave up.

    rollbacks: of the manifest: a checkpoint between the two steps of one holds weights that were given up.
    """
    return [
        each
        for each in readable(run_dir)
        if each.manifest.step <= step
        and not any(first < each.manifest.step < last for first, last in rollbacks)
    ]


def best(checkpoints: list[Checkpoint], metric: str, count: int) -> list[Checkpoint]:
    """The `count` checkpoints with the lowest value of a metric, best first; those without it left out."""
    measured = [each for each in checkpoints if metric in each.manifest.metrics]
    return sorted(measured, key=lambda each: each.manifest.metrics[metric])[:count]
