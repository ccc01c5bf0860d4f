"""Going back to earlier weights when leaving out steps does not help.

A step that is skipped leaves no trace, so a run survives bad samples alone. When steps stay bad, the
weights that came before them are at fault. PaLM (arXiv 2204.02311, section 5.1) then restarted from a
checkpoint about 100 steps before the spike and left out 200 to 500 batches, those before and during it; the
same batches did no harm to other weights. So does a run here, by itself: the place in the data, the
learning rate and the schedule stay where they are, and only what the weights learnt since that checkpoint
is given up. The checkpoint that follows holds it, so that a run that is killed before it finds the same
spikes again, and goes back alike.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llada_megatron.checkpoint import store
from llada_megatron.checkpoint.retention import from_before
from llada_megatron.config.errors import RunFailed
from llada_megatron.parallel.ranks import from_first_rank
from llada_megatron.record.manifest import Checkpoint, readable
from llada_megatron.training.position import Position, newest_good
from llada_megatron.training.skips import Skips
from llada_megatron.training.spikes import Spikes
from llada_megatron.training.step import Trainer, open_stage


def restore(trainer: Trainer, checkpoint: Checkpoint) -> Position:
    """Load a verified checkpoint, optimizer and what spikes are told by included; returns its place."""
    manifest = checkpoint.manifest
    store.load(checkpoint.path, trainer.model, trainer.optimizer, average=trainer.average)
    trainer.spikes = Spikes(manifest.losses_lately, manifest.grad_norms_lately)
    return Position(
        manifest.step,
        manifest.skipped_steps,
        manifest.wall_sec,
        manifest.autoregressive_tokens,
        Skips(manifest.skipped_lately, manifest.left_out_lately),
        manifest.rollbacks,
    )


def go_back(trainer: Trainer, position: Position, step: int, failure: RunFailed) -> Position:
    """Take the weights of the newest good checkpoint from before the steps that were skipped lately.

    The run has done `step` steps, and what it learnt since that checkpoint is left out as
    training.skip_samples would leave it out. Every rank calls it; returns the run's position. Raises
    RunFailed, on every rank, where the run may not go back (again), or has nothing to go back to.
    """
    done, most = position.rollbacks, trainer.config.training.max_rollbacks
    if not most:
        raise failure
    if len(done) >= most:
        raise RunFailed(f"{failure} The run may not go back once more: training.max_rollbacks={most}.")
    first_skipped = position.skips.steps[0]
    run_dir = Path(trainer.config.run.dir)
    checkpoint = newest_good(from_first_rank(_paths_from_before, run_dir, first_skipped, done))
    if checkpoint is None:
        raise RunFailed(
            f"{failure} There is no good checkpoint from before step {first_skipped} to go back to: lower"
            " checkpoint.every_steps."
        )
    earlier = restore(trainer, checkpoint)
    for passed in range(earlier.step, step):
        open_stage(trainer, passed)
    return replace(
        position,
        skipped_steps=earlier.skipped_steps,
        skips=earlier.skips,
        rollbacks=[*done, [earlier.step, step]],
    )


def _paths_from_before(run_dir: Path, step: int, rollbacks: list[list[int]]) -> list[Path]:
    return [each.path for each in from_before(readable(run_dir), step, rollbacks)]
