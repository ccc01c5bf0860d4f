"""Starts the processes of a run on this machine, forked from one preloaded parent.

Importing torch and megatron-core takes ten seconds and more; multiprocessing's fork server imports them
once and forks every worker from there. Under torchrun or srun nothing is started: see `already_started`.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

GRACE_SEC = 10.0
"""How long the others get to end after the first process failed."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class WorkerError(RuntimeError):
    """A worker failed; the message holds its rank and traceback."""


def already_started() -> bool:
    """Whether torchrun or srun has made this process one of several; adopts Slurm's variables."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        for name, slurm in (("RANK", "PROCID"), ("LOCAL_RANK", "LOCALID"), ("WORLD_SIZE", "STEP_NUM_TASKS")):
            os.environ[name] = os.environ[f"SLURM_{slurm}"]
    return "RANK" in os.environ


def threads_per_process(processes: int) -> int:
    """Cores of this machine divided evenly, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def launch(worker: Callable[..., Any], *args: Any, processes: int, preload: str) -> list[Any]:
    """Run worker(*args) in `processes` ranks and return their results in rank order.

    worker and args are picklable; `preload` is the module that the parent of the ranks imports. Raises
    what a rank raised (ValueError and OSError as they are, anything else as WorkerError with the rank's
    traceback) after ending the others; SIGINT, SIGTERM and SIGUSR1 are passed on to every rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    port = _free_port()
    ranks, pipes = [], []
    for rank in range(processes):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(rank, processes, port, sender, worker, args))
        process.start()
        sender.close()
        ranks.append(process)
        pipes.append(receiver)
    handlers = {number: signal.getsignal(number) for number in FORWARDED}

    def forward(number: int, _frame: Any) -> None:
        for process in ranks:
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)

    try:
        for number in FORWARDED:
            signal.signal(number, forward)
        return _collect(ranks, pipes)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(
    rank: int, processes: int, port: int, sender: Any, worker: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    )
    try:
        sender.send((worker(*args), None, ""))
    except KeyboardInterrupt as error:
        sender.send((None, error, ""))
    except Exception as error:
        keep = error if isinstance(error, ValueError | OSError) else WorkerError(str(error))
        sender.send((None, keep, traceback.format_exc()))


def _collect(ranks: list[Any], pipes: list[Any]) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        for pipe in multiprocessing.connection.wait(list(waiting)):
            rank = waiting.pop(pipe)  # type: ignore[index]
            try:
                result, error, trace = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                ranks[rank].join(GRACE_SEC)
                result, trace = None, ""
                error = WorkerError(f"process {rank} died with exit code {ranks[rank].exitcode}")
            if error is not None:
                _end(ranks)
                if isinstance(error, WorkerError) and trace:
                    raise WorkerError(f"process {rank} failed:\n{trace}") from None
                raise error
            results[rank] = result
    for process in ranks:
        process.join()
    return [results[rank] for rank in range(len(ranks))]


def _end(ranks: list[Any]) -> None:
    deadline = time.monotonic() + GRACE_SEC
    for process in ranks:
        process.terminate()
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
