"""`llada train --supervise`: the life of a run on one machine, with the record and the cap of a Slurm job."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from llada_megatron.commands import train
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.runtime.launch import WorkerDied
from llada_megatron.verify.layouts import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("paragraphs"))


def configure(corpus, run_dir, *overrides):
    small = ["model.hidden_size=64", "model.head_dim=16", "model.expert_hidden_size=32"]
    return compose(["experiment=parity", *small, f"data.path=[{corpus}]", f"run.dir={run_dir}", *overrides])


def ended(run_dir):
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == "ended"]


def kill_ranks(run_dir, when, times):
    """Kill the ranks as soon as `when(run_dir)` holds, `times` times, each time another process."""

    def watch():
        killed = set()
        while len(killed) < times:
            ranks = {child.pid for child in multiprocessing.active_children()} - killed
            if ranks and when(run_dir):
                for pid in ranks:
                    os.kill(pid, signal.SIGKILL)
                killed |= ranks
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()


def test_a_supervised_run_is_started_again_after_a_kill_and_finishes(corpus, tmp_path):
    kill_ranks(tmp_path, lambda run: (run / "checkpoints" / "step_00000002").exists(), times=1)
    config = configure(corpus, tmp_path, "checkpoint.every_steps=1", "training.steps=4")
    assert train.supervise(config).finished
    assert [event["outcome"] for event in ended(tmp_path)] == ["again", "finished"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_a_supervised_run_that_always_dies_stops_at_the_cap(corpus, tmp_path):
    kill_ranks(tmp_path, lambda run: True, times=3)
    with pytest.raises(WorkerDied, match="SIGKILL"):
        train.supervise(configure(corpus, tmp_path, "training.steps=4"))
    assert [event["outcome"] for event in ended(tmp_path)] == ["again", "again", "failed"]


def test_bad_input_is_not_tried_again(corpus, tmp_path):
    config = configure(f"{corpus}_absent", tmp_path)
    with pytest.raises(BadInput, match="absent"):
        train.supervise(config)
    assert [event["outcome"] for event in ended(tmp_path)] == ["failed"]
