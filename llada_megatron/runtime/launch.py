"""Starts the processes of a run on this machine, forked from one preloaded parent.

Importing torch and megatron-core takes ten seconds and more; multiprocessing's fork server imports them
once and forks every worker from there. Under torchrun or srun nothing is started: see `already_started`.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from llada_megatron.config.errors import Refusal, RunFailed, limit_met
from llada_megatron.runtime import interrupts

GRACE_SEC = 10.0
"""How long the others get to end after the first process failed."""
SETTLE_SEC = 1.0
"""How long to wait for the cause: a failed rank breaks the others' collectives, and they may report first."""
AS_THEY_ARE = (Refusal, OSError)
FIRST_PORT, PORTS = 20_000, 10_000
FREEZE = "llada_megatron.runtime.parent"
"""The last module that the parent of ranks imports."""


class WorkerError(RuntimeError):
    """A worker failed; the message holds its rank and traceback."""


class WorkerDied(RunFailed, WorkerError):
    """A worker ended without a word; the message holds its rank and how."""


class _Blame(IntEnum):
    """How well a failure explains that several ranks failed at once; the lowest is reported."""

    KILLED = 0  # by SIGKILL, which no failure of another rank brings about before `_end`
    RAISED = 1  # a sentence for the user
    DIED = 2
    FOLLOWED = 3  # any other exception, such as a collective whose peer is gone


@dataclass
class _Failure:
    error: BaseException
    blame: _Blame


def already_started() -> bool:
    """Whether torchrun or srun has made this process one of several; adopts Slurm's variables."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        for name, slurm in (("RANK", "PROCID"), ("LOCAL_RANK", "LOCALID"), ("WORLD_SIZE", "STEP_NUM_TASKS")):
            os.environ[name] = os.environ[f"SLURM_{slurm}"]
        os.environ.setdefault("MASTER_ADDR", os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
        # The same for every rank of an attempt, and another one for the next: the last one's may linger.
        attempt = int(os.environ.get("SLURM_JOB_ID", "0")) * 7 + int(
            os.environ.get("SLURM_RESTART_COUNT", "0")
        )
        os.environ.setdefault("MASTER_PORT", str(FIRST_PORT + attempt % PORTS))
    return "RANK" in os.environ


def node() -> str:
    """This machine's name: Slurm's, which may differ from the host's, where there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def in_slurm_job() -> bool:
    """Whether this is part of a job of Slurm."""
    return "SLURM_JOB_ID" in os.environ


def set_environment(last_messages: str) -> None:
    """What torch reads in the ranks of a run, before it is imported; what the user has set stays.

    Memory of a device grows in place, since no two batches need the same; NCCL must not register such memory
    in captured graphs (megatron-core's cuda_graphs.py). A rank keeps its last messages over NCCL, a few MB of
    host memory, and when one times out writes them to `last_messages` and its number.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", os.path.abspath(last_messages))


def launch(worker: Callable[..., Any], *args: Any, processes: int, preload: str) -> list[Any]:
    """Run worker(*args) in `processes` ranks and return their results in rank order.

    worker and args are picklable; `preload` is the module that the parent of the ranks imports. Raises
    what a rank raised (AS_THEY_ARE as they are, anything else as WorkerError with the rank and its
    traceback) after ending the others; signals are passed on to every rank, where they interrupt a worker
    that does not handle them. The ranks do not outlive this process.
    """
    # Through the driver's monitor, asking whether CUDA is there leaves the parent of the forks untouched.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # Threads that wait for an operation's last one spin, and where others compute too they hold the core that
    # it needs (up to ten times slower); 10,000 turns hide a wake-up on idle cores and then give way.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload, FREEZE])
    with interrupts.held_back():  # a signal to the group ends neither the ranks' parent nor its imports
        forkserver.ensure_running()
    meeting = tempfile.mkdtemp(prefix="llada_ranks_")  # a file: a port could be taken by others meanwhile
    ranks: list[Any] = []
    pipes = []
    with interrupts.passed_on() as signals:
        try:
            for rank in range(processes):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(rank, processes, meeting, sender, worker, args))
                _start(process)
                sender.close()
                ranks.append(process)
                pipes.append(receiver)
            return _collect(ranks, pipes, signals)
        except BaseException:
            _end(ranks)
            raise
        finally:
            shutil.rmtree(meeting, ignore_errors=True)


def _run(
    rank: int, processes: int, meeting: str, sender: Any, worker: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        LLADA_STORE=f"{meeting}/store",
        GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    )
    try:
        try:
            interrupts.end_with_parent()
            interrupts.handle(interrupts.interrupt)
            interrupts.let_in()
            result = worker(*args)
        finally:
            interrupts.ignore()
        sender.send((result, None))
    except (*AS_THEY_ARE, KeyboardInterrupt) as error:
        sender.send((None, _Failure(error, _Blame.RAISED)))
    except Exception as error:
        if limit := limit_met(error):  # of the machine; the others only follow
            sender.send((None, _Failure(RunFailed(f"{limit} (process {rank})"), _Blame.RAISED)))
            return
        bug = WorkerError(f"process {rank} failed:\n{traceback.format_exc()}")
        sender.send((None, _Failure(bug, _Blame.FOLLOWED)))


def _collect(ranks: list[Any], pipes: list[Connection], signals: int) -> list[Any]:
    """Results in rank order; raises the failure that explains the others.

    signals: where the numbers of those that arrive are read.
    """
    results: dict[int, Any] = {}
    failures: list[_Failure] = []
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = float("inf")
    while waiting and time.monotonic() < deadline:
        timeout = max(0.0, deadline - time.monotonic()) if failures else None
        ready = wait([*waiting, signals], timeout)
        if signals in ready:
            _pass_on(os.read(signals, 64), ranks)
        for pipe in cast(list[Connection], [each for each in ready if each != signals]):
            rank = waiting.pop(pipe)
            try:
                results[rank], failure = pipe.recv()
            except EOFError:
                ranks[rank].join(GRACE_SEC)
                code = ranks[rank].exitcode
                blame = _Blame.KILLED if code == -signal.SIGKILL else _Blame.DIED
                failure = _Failure(WorkerDied(f"process {rank} {_how(code)}"), blame)
            if failure is not None:
                failures.append(failure)
                deadline = min(deadline, time.monotonic() + SETTLE_SEC)
    if failures:
        raise min(failures, key=lambda failure: failure.blame).error
    for process in ranks:
        process.join()
    return [results[rank] for rank in range(len(ranks))]


def _start(process: Any) -> None:
    try:
        process.start()
    except (EOFError, ConnectionError) as error:
        raise WorkerDied(
            "the parent of the ranks ended before they began; what it said stands above, and a limit of this"
            " machine may be why: `ulimit -a` shows memory (-v) and processor time (-t)"
        ) from error


def _pass_on(numbers: bytes, ranks: list[Any]) -> None:
    for number in dict.fromkeys(numbers):
        for process in ranks:
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)


def _how(code: int | None) -> str:
    return (
        f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
    )


def _end(ranks: list[Any]) -> None:
    deadline = time.monotonic() + GRACE_SEC
    for process in ranks:
        process.terminate()
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
