"""A run directory has one training at a time, and a killed one leaves nothing behind that blocks."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import pytest

from llada_megatron.config.errors import RunHeld
from llada_megatron.guard.exclusive import only_training_of
from llada_megatron.record.run_dir import RunDir
from tests.distributed import forked


def hold(run_dir: Path) -> None:
    with only_training_of(run_dir):
        (run_dir / "held").touch()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[multiprocessing.process.BaseProcess]:
    """Another process that trains in tmp_path."""
    process = forked().Process(target=hold, args=(tmp_path,))
    process.start()
    while not (tmp_path / "held").exists():
        assert process.is_alive()
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


def test_a_job_waits_for_what_lingers_of_the_last_one(tmp_path: Path, holder) -> None:
    Timer(0.5, holder.kill).start()
    with only_training_of(tmp_path, wait_sec=30):
        assert RunDir(tmp_path).lock.read_text().startswith(f"process {os.getpid()} on ")


def test_a_second_training_is_refused_and_the_holder_s_death_frees_the_run(tmp_path: Path, holder) -> None:
    held = pytest.raises(RunHeld, match=f"is being trained by process {holder.pid} on")
    with held, only_training_of(tmp_path):
        pass
    holder.kill()
    holder.join()
    for _ in range(2):  # and its own end frees it
        with only_training_of(tmp_path):
            assert RunDir(tmp_path).lock.read_text().startswith(f"process {os.getpid()} on ")
