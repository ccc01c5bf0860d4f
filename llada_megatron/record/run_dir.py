"""Every path in a run's directory, and the names of its checkpoints, spelled once. Standard library only."""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "manifest.json"
"""In a checkpoint; its presence means that the checkpoint is whole."""
PAGE = "index.html"
"""Of a report's folder, or of a comparison's."""
SHARDS = "shards"
"""Folder of a checkpoint with its weights, in megatron-core's torch_dist format."""
OPTIMIZER = "optimizer"
"""Folder with what only training reads, in the same format; earlier checkpoints hold it among the weights."""

EMA = "ema"
"""Folder with the moving average of the weights, in the same format, of a run that keeps one."""


class RunDir:
    """Where a run keeps what; nothing is made or looked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.events = self.path / "events.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.scores = self.path / "eval"  # results of `llada eval --json` that the report shows
        self.prometheus = self.path / "metrics.prom"
        self.wandb = self.path / "wandb"
        self.wandb_id = self.path / "wandb_id"
        self.identity = self.path / "run_id"  # that no other run has, in this directory or in another
        self.checkpoints = self.path / "checkpoints"
        self.merged = self.path / "merged"
        self.lock = self.path / "training.lock"
        self.profile_request = self.path / "profile.json"  # `llada profile` waits for an answer
        self.profiles = self.path / "profiles"
        self.stacks = self.path / "stacks"
        self.last_messages = self.stacks / "nccl_rank_"  # and the rank's number: what torch writes
        self.report = self.path / "report"
        self.report_page = self.report / PAGE
        self.report_json = self.path / "report.json"
        self.logs = self.path / "logs"
        self.stop = self.path / "stop"  # `llada stop` was called, so nothing is requeued
        self.submission = self.path / "submission"
        self.submission_json = self.submission / "submission.json"
        self.submission_lock = self.submission / "lock"
        self.job_script = self.submission / "job.sbatch"
        self.source_diff = self.submission / "source.diff"

    @property
    def records(self) -> list[Path]:
        """What a run has written beside its checkpoints and would miss."""
        records = [self.config, self.metrics, self.evaluations, self.samples, self.events]
        return [*records, self.wandb_id, self.identity]

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after `step` steps."""
        return self.checkpoints / f"step_{step:08d}"

    def whole_checkpoints(self) -> list[Path]:
        """Checkpoints that were published, oldest first."""
        found = sorted(self.checkpoints.glob("step_*"))
        return [path for path in found if step_of(path) is not None and (path / MANIFEST).is_file()]

    def newest_step(self) -> int:
        """Steps in the newest whole checkpoint; 0 without one."""
        return max((step_of(path) or 0 for path in self.whole_checkpoints()), default=0)

    def partial_checkpoints(self) -> list[Path]:
        """Checkpoints that are being written, or that a crash left half-written."""
        return list(self.checkpoints.glob(".step_*.partial"))

    def damaged_checkpoints(self) -> list[Path]:
        """Checkpoints that were found damaged and set aside, by name."""
        return sorted(self.checkpoints.glob("damaged_*"))

    def config_on(self, nodes: int) -> Path:
        """The configuration on so many nodes, of a run that may go on with fewer."""
        return self.submission / f"nodes_{nodes:05d}.yaml"

    def node_counts(self) -> list[int]:
        """So many nodes a run may have, the most first; none for one that needs all of them."""
        return sorted((int(path.stem[6:]) for path in self.submission.glob("nodes_*.yaml")), reverse=True)

    def profile(self, step: int) -> Path:
        """What was recorded from a step on."""
        return self.profiles / f"step_{step:08d}"

    def attempt_logs(self, attempt: int) -> Path:
        """Where the ranks of an attempt write, one file each."""
        return self.logs / f"attempt_{attempt:03d}"

    def memory_snapshot(self, rank: int) -> Path:
        """What a rank that ran out of memory writes."""
        return self.path / "memory" / f"rank_{rank:05d}.pickle"

    def stacks_of(self, rank: int) -> Path:
        """What the watchdog of a rank writes."""
        return self.stacks / f"rank_{rank:05d}.txt"

    def all_stacks(self) -> list[Path]:
        """Those that any rank has written, by rank; an empty file says nothing."""
        return sorted(self.stacks.glob("rank_*.txt"))


def step_of(checkpoint: Path) -> int | None:
    """Steps that a checkpoint's name says; None for a name that no run gives."""
    named = re.fullmatch(r"step_(\d+)", checkpoint.name)
    return int(named[1]) if named else None


def partial(final: Path) -> Path:
    """Where a directory that will be `final` is written: a name that is never looked for."""
    return final.with_name(f".{final.name}.partial")


def damaged(checkpoint: Path) -> Path:
    """What a damaged checkpoint is renamed to."""
    return checkpoint.with_name(f"damaged_{checkpoint.name}")


def trace_of(profile: Path, rank: int) -> Path:
    """The trace of a rank, in Chrome's format, of a profile's."""
    return profile / f"rank_{rank:05d}.json.gz"


def operators_of(profile: Path, rank: int) -> Path:
    """What the operators of that trace took in all; written last."""
    return profile / f"rank_{rank:05d}.operators.json"


def rank_log(attempt_logs: Path, rank: int) -> Path:
    """The log of one rank, of an attempt's."""
    return attempt_logs / f"rank_{rank:05d}.log"


def rank_logs(attempt_logs: Path) -> list[Path]:
    """The logs of an attempt, by rank."""
    return sorted(attempt_logs.glob("rank_*.log"))
