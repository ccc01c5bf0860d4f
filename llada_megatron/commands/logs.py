"""The verb `llada logs`: one rank's log, or those of all ranks with the errors first."""

from __future__ import annotations

import argparse
from pathlib import Path

from llada_megatron.config.errors import BadInput
from llada_megatron.jobs import attempts
from llada_megatron.record import events
from llada_megatron.record.run_dir import RunDir, rank_log, rank_logs

EXAMPLE = "llada logs runs/llada2_flash --rank 3"
CONTEXT_LINES = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--rank", type=int, metavar="N", help="this rank's log alone, whole")
    parser.add_argument("--attempt", type=int, metavar="N", help="counted from 0; default: the newest")


def run(args: argparse.Namespace) -> int:
    """Print logs: 0; BadInput when there are none."""
    if min(args.rank or 0, args.attempt or 0) < 0:
        raise BadInput("--rank and --attempt are counted from 0.")
    attempt = attempts.count(events.read(args.run)) - 1 if args.attempt is None else args.attempt
    folder = RunDir(args.run).attempt_logs(attempt)
    logs = rank_logs(folder)
    if args.rank is not None:
        logs = [rank_log(folder, args.rank)]
    if not logs or not logs[0].is_file():
        raise BadInput(f"{folder} has no such log: `llada status {args.run}` shows what the run has done.")
    if args.rank is not None:
        print(logs[0].read_text(errors="replace"), end="")
        return 0
    print(merged(logs, RunDir(args.run).all_stacks()), end="")
    return 0


def merged(logs: list[Path], stacks: list[Path]) -> str:
    """Errors of every rank first, then the stacks of a hang, then all of rank 0's log."""
    parts = []
    for log in logs:
        lines = log.read_text(errors="replace").splitlines()
        at = [index for index, line in enumerate(lines) if attempts.ERROR.search(line)]
        if at:
            shown = lines[max(0, at[0] - CONTEXT_LINES) : at[-1] + 1]
            parts.append(f"== error of {log.stem}\n" + "\n".join(shown))
    for stack in stacks:
        if text := stack.read_text(errors="replace"):
            parts.append(f"== stacks of {stack.stem}\n{text}")
    parts.append(f"== {logs[0].stem}\n{logs[0].read_text(errors='replace')}")
    return "\n".join(parts)
