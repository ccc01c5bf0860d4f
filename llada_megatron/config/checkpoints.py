"""When a run saves, where, and what it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llada_megatron.config.ranges import Count, Path, Positive, Range, Text, metric


@dataclass
class CheckpointConfig:
    """What is kept, and what a run starts from."""

    every_steps: Count = 0
    """0: only at the end, on a signal and at the end of a stage."""
    at_stage_end: bool = True
    in_background: bool | None = None
    """Write while training goes on, from a copy in host memory of what this rank saves; null: on CUDA."""
    writer_threads: Annotated[int, Range(at_least=1, at_most=64)] = 4
    """Files that each rank writes at the same time; small parts share one."""
    keep_last: Positive = 2
    """Older checkpoints are deleted, except those at the end of a stage and those kept by the next keys."""
    keep_every_steps: Count = 0
    """Checkpoints at multiples of this step stay for good; 0: none."""
    keep_best: Count = 0
    """Number of checkpoints that stay because their `best_metric` is lowest."""
    best_metric: Annotated[str, metric] = "nll_block32"
    """Of the evaluation at that step: `nll_ar`, or `nll_block` and one of evaluation.block_sizes."""
    copy_to: Text = ""
    """A URL such as s3://bucket/run where each checkpoint is copied too; a run whose run.dir is lost goes on
    from there. Empty: no copies."""
    memory_every_steps: Count = 0
    """Keep a copy in the nodes' memory, each rank's files on its node and on the next one; 0: never."""
    memory_dir: Path = "/dev/shm/llada_megatron"
    """Where a node keeps its copies: in memory, and its own."""
    init_from: Text = ""
    """A checkpoint (or a run's directory: its newest) whose weights alone are taken."""
