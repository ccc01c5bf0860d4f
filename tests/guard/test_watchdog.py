"""Processes that stop making progress end by themselves."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from tests.distributed import run_ranks

STUCK = """
import os, signal, sys, time
from pathlib import Path
from llada_megatron.guard.watchdog import Watchdog

def stuck_here():  # from the start on: a busy machine may be slow to get to the call
    watchdog.start()
    if sys.argv[3] == "stop":
        watchdog.stop_was_asked()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    signal.sigwait([signal.SIGUSR1])  # in C, as inside a collective

watchdog = Watchdog(Path(sys.argv[1]), 3, hang_timeout_sec=float(sys.argv[2]), stop_deadline_sec=0.2)
if sys.argv[3] == "beat":
    began = time.monotonic()
    watchdog.start()
    while time.monotonic() < began + 1.2 * float(sys.argv[2]):
        time.sleep(0.05)
        watchdog.beat()
    watchdog.close()
    sys.exit()
stuck_here()
"""


def run_stuck(folder, hang_timeout_sec: float, how: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", STUCK, str(folder), str(hang_timeout_sec), how]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("hang_timeout_sec", "how"), [(0.3, "hang"), (0, "stop"), (1000, "stop")])
def test_no_progress_ends_the_process_and_leaves_its_stack(tmp_path, hang_timeout_sec, how):
    done = run_stuck(tmp_path, hang_timeout_sec, how)
    assert done.returncode == 1, done.stderr
    assert "stuck_here" in (tmp_path / "stacks" / "rank_00003.txt").read_text()


def test_a_process_that_makes_progress_is_left_alone_and_leaves_nothing(tmp_path):
    assert run_stuck(tmp_path, 3, "beat").returncode == 0  # its beats take longer than the limit
    assert not list((tmp_path / "stacks").iterdir())


def hear_a_signal_during_a_call_to_c() -> tuple[bytes, int]:
    """What ended a call into C that only who hears the signal can end, and the signal remembered then."""
    import ctypes

    from llada_megatron.guard.signals import StopRequest

    reading, writing = os.pipe()
    stop = StopRequest(lambda: os.write(writing, b"heard"))
    signal.siginterrupt(signal.SIGTERM, False)  # the call goes on, as a collective would
    unheard = threading.Timer(60, os.write, (writing, b"never"))
    unheard.start()
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    said = ctypes.create_string_buffer(5)
    ctypes.CDLL(None).read(reading, said, 5)  # without the interpreter lock
    number = stop.number
    unheard.cancel()
    stop.release()
    return said.raw, number


def test_a_signal_is_heard_while_the_main_thread_is_inside_a_call_to_c():
    assert run_ranks(hear_a_signal_during_a_call_to_c) == [(b"heard", signal.SIGTERM)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "ask"),
    [(["training.hang_timeout_sec=10"], False), (["training.stop_deadline_sec=2"], True)],
    ids=["hang", "stop"],
)
def test_a_rank_that_hangs_ends_the_run_with_the_stacks_of_those_that_wait(corpus, tmp_path, limits, ask):
    command = [sys.executable, "-m", "llada_megatron", "train", "experiment=parity", "layout.processes=2"]
    command += [f"data.path=[{corpus}]", f"run.dir={tmp_path}", *limits]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
        time.sleep(0.05)
        assert run.poll() is None
    ranks = [child for child in psutil.Process(run.pid).children(recursive=True) if not child.children()]
    stopped = max(ranks, key=lambda rank: rank.create_time())  # the last one started is a rank
    stopped.suspend()
    if ask:
        run.send_signal(signal.SIGUSR1)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "no progress for training.hang_timeout_sec" in said and "the same command goes on" in said
    stacks = [file.read_text() for file in (tmp_path / "stacks").glob("rank_*.txt")]
    [stack] = [text for text in stacks if text]  # the stopped one cannot write its own
    assert "train_step" in stack or "agreed" in stack
