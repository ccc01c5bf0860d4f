"""A run that is killed, stopped and resumed trains the same model as one that is not: tried, not argued.

One run goes through without interruption. Another is killed in the middle of a step, killed in the middle of
a save, stopped by SIGUSR1, and resumed each time, at last under another layout if one is given.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config
from llada_megatron.record.manifest import find, git_commit, versions
from llada_megatron.record.metrics import read_jsonl, step_seconds
from llada_megatron.record.run_dir import SHARDS, RunDir
from llada_megatron.runtime.launch import WorkerDied, launch
from llada_megatron.verify import journal
from llada_megatron.verify.layouts import write_corpus

TOLERANCE = 2e-6
"""Relative difference of losses in fp32 between layouts; within one layout there is none."""
POLL_SEC = 0.0005
PRELOAD = "llada_megatron.training.loop"
STAGES = (
    "schedule.stages=[{name: ar, objective: autoregressive, block_size: '1', tokens: 2048},"
    " {name: bdlm_4, block_size: '4', tokens: 4096}, {name: bdlm_32, block_size: '32', tokens: 4096},"
    " {name: mdlm, block_size: full, tokens: 2048}]"
)


@dataclass
class Interruption:
    """What ended an attempt, after how many recorded steps, and where the next one went on."""

    kind: str
    after_step: int
    resumed_from: int


@dataclass
class Certificate:
    """A resumed run (b) against one without interruption (a)."""

    layout_a: list[str]
    layout_b: list[str]
    steps: int
    losses_a: list[float]
    losses_b: list[float]
    sample_ids_sha256: str
    noise_sha256: str
    weights_sha256: str
    """Of run b: weights, moments, masters, expert biases."""
    bitwise: bool
    """Losses and all of weights_sha256 equal those of run a."""
    max_rel: float
    same_samples: bool
    same_noise: bool
    interruptions: list[Interruption]
    versions: dict[str, str]
    git_commit: str

    @property
    def passed(self) -> bool:
        within = self.bitwise if self.layout_a == self.layout_b else self.max_rel <= TOLERANCE
        return within and self.same_samples and self.same_noise and len(self.losses_a) == self.steps

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "tolerance": TOLERANCE, "passed": self.passed}


def check(overrides: list[str], other_layout: list[str], *, seed: int = 0) -> Certificate:
    """Interrupt and resume the run that `overrides` describe; `other_layout` overrides the last attempt.

    experiment=parity brings its own text; any other must name prepared data. `seed` chooses the moments.
    """
    with tempfile.TemporaryDirectory(prefix="llada_resume_") as folder:
        return _Check(Path(folder), overrides, other_layout, random.Random(seed)).certificate()


class _Check:
    worker = staticmethod(journal.train_and_record)

    def __init__(
        self, folder: Path, overrides: list[str], other_layout: list[str], moments: random.Random
    ) -> None:
        self.folder, self.overrides, self.other_layout, self.moments = (
            folder,
            overrides,
            other_layout,
            moments,
        )
        self.own_text: list[str] = []
        if "experiment=parity" in overrides and not any(o.startswith("data.path") for o in overrides):
            self.own_text = [f"data.path=[{write_corpus(folder)}]", STAGES]

    def certificate(self) -> Certificate:
        straight, broken = self.folder / "straight", self.folder / "interrupted"
        self._train(self._config(straight))
        self.step_sec = step_seconds(read_jsonl(RunDir(straight).metrics)[-1])
        often = [*self.overrides, "checkpoint.every_steps=1"]
        interruptions = [
            self._interrupt(often, broken, "kill -9 in a step", self._kill_in_a_step),
            self._interrupt(often, broken, "kill -9 in a save", self._kill_in_a_save),
            self._interrupt(often, broken, "SIGUSR1", self._signal),
        ]
        self._train(self._config(broken, *self.other_layout))
        losses_a, losses_b = (
            [r["loss"] for r in read_jsonl(RunDir(run).metrics)] for run in (straight, broken)
        )
        state_a, state_b = (self._state_sha256(run) for run in (straight, broken))
        journal_a, journal_b = (journal.Journal(self._journal(run)) for run in (straight, broken))
        pairs = zip(losses_a, losses_b, strict=False)
        return Certificate(
            layout_a=self.overrides,
            layout_b=self.overrides + self.other_layout,
            steps=len(losses_b),
            losses_a=losses_a,
            losses_b=losses_b,
            sample_ids_sha256=journal_b.samples_sha256(),
            noise_sha256=journal_b.batches_sha256(),
            weights_sha256=state_b,
            bitwise=losses_a == losses_b and state_a == state_b,
            max_rel=max((abs(b - a) / abs(a) for a, b in pairs), default=math.nan),
            same_samples=journal_a.batches.keys() == journal_b.batches.keys(),
            same_noise=journal_a.batches == journal_b.batches,
            interruptions=interruptions,
            versions=versions(),
            git_commit=git_commit(),
        )

    def _config(self, run_dir: Path, *overrides: str) -> Config:
        config = compose([*self.overrides, *self.own_text, f"run.dir={run_dir}", *overrides])
        config.precision.deterministic = True  # of CUDA: the certificate compares bits
        return config

    def _journal(self, run_dir: Path) -> Path:
        return run_dir.with_name(f"{run_dir.name}_journal")

    def _train(self, config: Config) -> None:
        launch(
            self.worker,
            config,
            self._journal(Path(config.run.dir)),
            processes=config.layout.processes,
            preload=PRELOAD,
        )

    def _interrupt(
        self, overrides: list[str], run_dir: Path, kind: str, strike: Callable[[Path, int], None]
    ) -> Interruption:
        """Train with a thread beside it that strikes once; BadInput when the run was over before that."""
        config = self._config(run_dir, *overrides[len(self.overrides) :])
        before = len(read_jsonl(RunDir(run_dir).metrics))
        striker = threading.Thread(target=strike, args=(run_dir, before), daemon=True)
        striker.start()
        try:
            self._train(config)
        except WorkerDied as death:
            if "SIGKILL" not in str(death):
                raise
        else:
            if kind != "SIGUSR1":
                raise BadInput(f"The run was over before `{kind}` could happen: give it more steps.")
        striker.join()
        step = len(read_jsonl(RunDir(run_dir).metrics))
        return Interruption(kind, step, RunDir(run_dir).newest_step())

    def _kill_in_a_step(self, run_dir: Path, before: int) -> None:
        saved = RunDir(run_dir).checkpoint(before + 1)
        while not saved.exists():
            time.sleep(POLL_SEC)
        time.sleep(self.moments.random() * self.step_sec)
        self._kill_a_rank()

    def _kill_in_a_save(self, run_dir: Path, before: int) -> None:
        _wait_for_steps(run_dir, before + 1)
        while not any(
            any((aside / SHARDS).glob("*.distcp")) for aside in RunDir(run_dir).partial_checkpoints()
        ):
            time.sleep(POLL_SEC)
        self._kill_a_rank()

    def _signal(self, run_dir: Path, before: int) -> None:
        _wait_for_steps(run_dir, before + 1)
        for rank in _ranks():  # not to this process: who interrupts a check ends it
            os.kill(rank, signal.SIGUSR1)

    def _kill_a_rank(self) -> None:
        os.kill(self.moments.choice(_ranks()), signal.SIGKILL)

    def _state_sha256(self, run_dir: Path) -> str:
        return launch(journal.state_sha256, find(str(run_dir)).path, processes=1, preload=PRELOAD)[0]


def _ranks() -> list[int]:
    return sorted(process.pid or 0 for process in multiprocessing.active_children())


def _wait_for_steps(run_dir: Path, steps: int) -> None:
    while len(read_jsonl(RunDir(run_dir).metrics)) < steps:
        time.sleep(POLL_SEC)
