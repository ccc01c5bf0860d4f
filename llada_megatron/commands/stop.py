"""The verb `llada stop`: a run saves and ends, and is not requeued until `llada resume`."""

from __future__ import annotations

import argparse
from pathlib import Path

from llada_megatron.config.errors import BadInput
from llada_megatron.jobs import slurm
from llada_megatron.record import events
from llada_megatron.record.run_dir import RunDir

EXAMPLE = "llada stop runs/llada2_flash"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", type=Path, metavar="RUN")


def run(args: argparse.Namespace) -> int:
    """Ask the run to stop: 0; BadInput when it has no job that waits or runs."""
    submitted = events.last(events.read(args.run), "submitted")
    state = slurm.state(submitted["job"]) if submitted else ""
    if submitted is None or state not in slurm.ACTIVE:
        raise BadInput(f"{args.run} has no job that waits or runs: there is nothing to stop.")
    RunDir(args.run).stop.touch()
    events.append(args.run, "stop_asked")
    if state == "RUNNING":
        slurm.signal(submitted["job"], "USR1")
        print(f"job {submitted['job']} saves at the next step and ends")
    else:
        slurm.cancel(submitted["job"])
        events.append(
            args.run,
            "ended",
            exit_code=None,
            step=RunDir(args.run).newest_step(),
            outcome="stopped",
            reason=f"`llada stop` was called while the job was {state.lower()}; `llada resume` goes on",
        )
        print(f"job {submitted['job']} was {state.lower()} and is cancelled")
    return 0
