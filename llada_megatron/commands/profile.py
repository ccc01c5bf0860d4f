"""The verb `llada profile`: what a run that trains computes in its next steps, without stopping it."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llada_megatron.config.compose import load
from llada_megatron.config.errors import BadInput, RunFailed
from llada_megatron.jobs.state import trainer_of
from llada_megatron.record.json_files import read_json
from llada_megatron.record.run_dir import RunDir, operators_of, trace_of

EXAMPLE = "llada profile runs/llada2_flash --steps 3 --ranks 0,7"
POLL_SEC = 0.2
SHOWN = 12
"""Operators in the table."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="so many steps (3)")
    parser.add_argument("--ranks", default="0", metavar="R,R", help="of these ranks (0)")
    parser.add_argument(
        "--nsys",
        action="store_true",
        help="no traces: ranges for `nsys profile --capture-range=cudaProfilerApi` around the ranks",
    )


def run(args: argparse.Namespace) -> int:
    """Ask the run, wait, and print where the traces are: 0.

    Raises BadInput for a run that does not train, RunFailed where it ends before the profile is whole.
    """
    files = RunDir(args.run)
    if not files.config.is_file():
        raise BadInput(f"{args.run} holds no run: there is no {files.config.name}.")
    ranks = _ranks(args.ranks, load(files.config).layout.processes)
    if args.steps < 1:
        raise BadInput(f"--steps {args.steps} records nothing: give at least 1.")
    if not (who := trainer_of(args.run)):
        raise BadInput(f"{args.run} is not training: start it, then profile it.")
    request = {"steps": args.steps, "ranks": ranks, "nsys": args.nsys, "asked_at": time.time()}
    _ask(files, request)
    print(f"asked {who} for {args.steps} steps of rank {args.ranks}", flush=True)
    try:
        folder = _once(args.run, who, lambda: _taken(files, request))
        print(f"recording from step {int(folder.name.removeprefix('step_'))} on", flush=True)
        if not args.nsys:
            _once(args.run, who, lambda: all(operators_of(folder, rank).exists() for rank in ranks) or None)
    finally:
        if files.profile_request.exists() and _content(files.profile_request) == request:
            files.profile_request.unlink(missing_ok=True)
    if args.nsys:
        print("nsys writes its report when the run ends")
        return 0
    print(f"\n{_table(ranks[0], json.loads(operators_of(folder, ranks[0]).read_text()))}\n")
    for rank in ranks:
        print(trace_of(folder, rank))
    print("open them in https://ui.perfetto.dev or chrome://tracing")
    return 0


def _ranks(text: str, processes: int) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) < processes for part in parts):
        raise BadInput(
            f"--ranks {text} will not do: give numbers from 0 to {processes - 1}, for example 0,1."
        )
    return sorted({int(part) for part in parts})


def _ask(files: RunDir, request: dict[str, Any]) -> None:
    """Leave the request where rank 0 looks, whole from its first moment on, unless one waits there."""
    aside = files.profile_request.with_name(f".{files.profile_request.name}.{os.getpid()}")
    aside.write_text(json.dumps(request))
    try:
        os.link(aside, files.profile_request)
    except FileExistsError:
        raise BadInput(
            f"Somebody else waits for a profile of {files.path}: wait too, or delete {files.profile_request}."
        ) from None
    finally:
        aside.unlink()


def _taken(files: RunDir, request: dict[str, Any]) -> Path | None:
    """The folder of the request that the run has taken; None while it has not."""
    found = files.profiles.glob(f"step_*/{files.profile_request.name}")
    return next((path.parent for path in found if _content(path) == request), None)


def _content(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, "ask again")
    except (BadInput, OSError):  # taken away, or half visible on another node's file system
        return {}


def _once[T](run_dir: Path, who: str, found: Callable[[], T | None]) -> T:
    """What is found once it is there; RunFailed when the one who trains ends before."""
    while True:
        trains = trainer_of(run_dir) == who  # before the look, or what its end left would be missed
        if (result := found()) is not None:
            return result
        if not trains:
            raise RunFailed(f"{run_dir} ended before the profile was whole: ask again when it trains.")
        time.sleep(POLL_SEC)


def _table(rank: int, operators: list[dict[str, Any]]) -> str:
    """The most expensive operators of a rank."""
    total = sum(each["ms"] for each in operators) or 1.0
    rows = [(f"{'rank ' + str(rank):<44}", "calls", "ms", "share")]
    rows += [
        (f"{each['name'][:44]:<44}", str(each["calls"]), f"{each['ms']:.1f}", f"{each['ms'] / total:.1%}")
        for each in operators[:SHOWN]
    ]
    return "\n".join(f"{name} {calls:>8} {ms:>10} {share:>7}" for name, calls, ms, share in rows)
