"""`llada train --supervise`: the life of a run on one machine, with the record and the cap of a Slurm job."""

import fcntl
import multiprocessing
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from llada_megatron.commands import train
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import NODE_FAULT, BadInput
from llada_megatron.record import events
from llada_megatron.record.run_dir import RunDir
from llada_megatron.runtime import interrupts
from llada_megatron.runtime.launch import WorkerDied, WorkerError, node
from llada_megatron.verify.layouts import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("paragraphs"))


def configure(corpus, run_dir, *overrides):
    small = ["model.hidden_size=64", "model.head_dim=16", "model.expert_hidden_size=32"]
    return compose(["experiment=parity", *small, f"data.path=[{corpus}]", f"run.dir={run_dir}", *overrides])


def ended(run_dir):
    return [event for event in events.read(run_dir) if event["event"] == "ended"]


def refused(run_dir):
    return [event for event in events.read(run_dir) if event["event"] == "refused"]


def kill_ranks(run_dir, when, times):
    """Kill the ranks of the first `times` attempts, each as soon as `when(run_dir)` holds."""

    def watch():
        while True:
            # Listed before the count is read: none of these belongs to an attempt past the last to kill.
            ranks = multiprocessing.active_children()
            if len(ended(run_dir)) >= times:
                return
            if when(run_dir):
                for rank in ranks:
                    rank.kill()
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
    assert [(event["outcome"], event["exit_code"]) for event in ended(tmp_path)] == [("failed", 2)]


def test_a_signal_between_two_attempts_stops_the_run(corpus, tmp_path, monkeypatch):
    def die_while_a_signal_arrives(*_, **__):
        monkeypatch.setattr(interrupts, "remembered", [signal.SIGTERM])
        raise WorkerDied("process 0 was killed by SIGKILL")

    monkeypatch.setattr(train.launch, "launch", die_while_a_signal_arrives)
    outcome = train.supervise(configure(corpus, tmp_path))
    assert outcome.signal == signal.SIGTERM and not outcome.finished
    assert [event["outcome"] for event in ended(tmp_path)] == ["again", "stopped"]


def reshape_wrongly(config):
    np.zeros(2).reshape(3)


def test_a_value_error_that_is_none_of_ours_keeps_its_traceback_and_is_tried_again(
    corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "_worker", reshape_wrongly)
    bug = r"process 0 failed:\n(.|\n)*in reshape_wrongly\n(.|\n)*ValueError: cannot reshape"
    with pytest.raises(WorkerError, match=bug):
        train.supervise(configure(corpus, tmp_path, "run.max_failures=2"))
    assert [(event["outcome"], event["exit_code"]) for event in ended(tmp_path)] == [
        ("again", 1),
        ("failed", 1),
    ]
    assert not refused(tmp_path)


def llada_train(corpus, run_dir, *overrides):
    """Exit code and standard error of the command, in a process of its own."""
    settings = ["experiment=parity", f"data.path=[{corpus}]", f"run.dir={run_dir}", *overrides]
    command = [sys.executable, "-m", "llada_megatron", "train", *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_a_failed_preflight_exits_3_and_its_nodes_are_on_record(corpus, tmp_path):
    full = ["training.preflight=true", "checkpoint.keep_last=1000000000"]
    code, said = llada_train(corpus, tmp_path, *full)
    [event] = refused(tmp_path)
    assert code == event["exit_code"] == NODE_FAULT == 3
    assert event["nodes"] == [node()] and f"llada train: error: {event['reason']}\n" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_bad_input_exits_2_and_a_run_that_is_held_4_and_both_are_on_record(corpus, tmp_path):
    code, said = llada_train(f"{corpus}_absent", tmp_path / "bad")
    assert code == refused(tmp_path / "bad")[0]["exit_code"] == 2 and "Traceback" not in said
    (tmp_path / "held").mkdir()
    with RunDir(tmp_path / "held").lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = llada_train(corpus, tmp_path / "held")
    assert code == refused(tmp_path / "held")[0]["exit_code"] == 4 and "Traceback" not in said
