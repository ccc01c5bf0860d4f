"""The verb `llada resume`: a run that stopped or failed is submitted again as it was, or on fewer nodes."""

from __future__ import annotations

import argparse
from pathlib import Path

from llada_megatron.commands.submit import resubmit

EXAMPLE = "llada resume runs/llada2_flash"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument(
        "--nodes",
        type=int,
        metavar="N",
        help="on so many nodes, one of the numbers for which slurm.min_nodes found a layout; a job that waits"
        " gets them too",
    )


def run(args: argparse.Namespace) -> int:
    """Submit the run again: 0; BadInput when it waits or runs, or was never submitted."""
    print(f"job {resubmit(args.run, args.nodes)}")
    return 0
