"""A run directory has one training at a time, and a killed one leaves nothing behind that blocks."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from threading import Timer

import pytest

from llada_megatron.training.exclusive import LOCK, only_training_of


def hold(run_dir: Path) -> None:
    with only_training_of(run_dir):
        (run_dir / "held").touch()
        time.sleep(60)


def test_a_job_waits_for_what_lingers_of_the_last_one(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path,))
    process.start()
    try:
        while not (tmp_path / "held").exists():
            assert process.is_alive()
            time.sleep(0.01)
        Timer(0.5, process.kill).start()
        with only_training_of(tmp_path, wait_sec=30):
            assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    finally:
        process.kill()
        process.join()


def test_a_second_training_is_refused_and_the_holder_s_death_frees_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = multiprocessing.get_context("fork").Process(target=hold, args=(run_dir,))
    process.start()
    try:
        while not (run_dir / "held").exists():
            assert process.is_alive()
            time.sleep(0.01)
        trained = pytest.raises(ValueError, match=f"is being trained by process {process.pid} on")
        with trained, only_training_of(run_dir):
            pass
    finally:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    with only_training_of(run_dir):
        assert (run_dir / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    with only_training_of(run_dir):
        pass
