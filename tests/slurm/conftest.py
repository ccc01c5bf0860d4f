"""One Slurm for all tests here, and runs that are small enough to be submitted many times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.machine import Slurm, missing

ROOT = Path(__file__).parents[2]
SMALL = ["model.hidden_size=64", "model.head_dim=16", "model.expert_hidden_size=32", "training.threads=1"]
TWO_NODES = ["cluster.nodes=2", "cluster.gpus_per_node=2", "layout.processes=4", "layout.tp=2"]
TWO_NODES += ["cluster.network_gb_per_sec=1", "cluster.network_latency_us=100"]
WAIT_SEC = 360


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    if reason := missing():
        pytest.skip(reason)
    try:
        machine = Slurm(tmp_path_factory.mktemp("slurm"))
    except RuntimeError as error:  # of this machine, not of the project
        pytest.skip(f"Slurm does not come up here: {error}")
    yield machine
    machine.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    from llada_megatron.verify.layouts import write_corpus

    return write_corpus(tmp_path_factory.mktemp("paragraphs"))


class Run:
    """One run directory, and `llada` called about it from a directory of its own."""

    def __init__(self, slurm: Slurm, directory: Path, corpus: str, *overrides: str) -> None:
        self.slurm, self.directory = slurm, directory
        self.overrides = ["experiment=parity", *SMALL, f"data.path=[{corpus}]", *overrides]

    def llada(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = {**self.slurm.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "llada_megatron", *arguments]
        done = subprocess.run(
            command, env=environment, cwd=self.directory.parent, capture_output=True, text=True, timeout=120
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def submit(self, *overrides: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        where = [f"run.dir={_quoted(self.directory)}", "run.name=life"]
        return self.llada("submit", *self.overrides, *where, *overrides, check=check)

    def status(self) -> dict:
        return json.loads(self.llada("status", str(self.directory), "--json").stdout)[0]

    def events(self, name: str = "") -> list[dict]:
        file = self.directory / "events.jsonl"
        found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [event for event in found if not name or event["event"] == name]

    def losses(self) -> list[float]:
        file = self.directory / "metrics.jsonl"
        return [json.loads(line)["loss"] for line in file.read_text().splitlines()] if file.exists() else []

    def wait(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT_SEC
        while not condition():
            assert time.monotonic() < deadline, self.story()
            time.sleep(0.2)

    def wait_for_end(self, outcome: str) -> None:
        self.wait(lambda: any(event["outcome"] in (outcome, "failed") for event in self.events("ended")))
        assert self.events("ended")[-1]["outcome"] == outcome, self.story()

    def job(self) -> str:
        return self.events("submitted")[-1]["job"]

    def has_left_the_queue(self) -> bool:
        return not self.slurm.run("squeue", "--noheader", f"--jobs={self.job()}", check=False)

    def story(self) -> str:
        """Everything that helps to understand a failure."""
        logs = [
            f"{path}:\n{path.read_text()[-1500:]}" for path in sorted(self.directory.rglob("logs/**/*.*"))
        ]
        queue = self.slurm.run("scontrol", "show", "job", self.job(), check=False)
        return "\n".join([json.dumps(self.events(), indent=1), queue, *logs])


def _quoted(path: Path) -> str:
    """A path as a value in hydra's grammar, whatever it holds."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


@pytest.fixture
def make_run(slurm, corpus, tmp_path) -> Callable[..., Run]:
    os.chmod(tmp_path, 0o755)
    return lambda *overrides, name="run": Run(slurm, tmp_path / name, corpus, *overrides)
