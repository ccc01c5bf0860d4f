"""The verb `llada sync`: what ranks without a way out recorded for wandb, uploaded from a node that has one."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

EXAMPLE = "llada sync runs/llada2_flash"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", type=Path, metavar="RUN")


def run(args: argparse.Namespace) -> int:
    """Upload every attempt's record under the run's one id: wandb's exit code; ValueError when there is none."""
    recorded = sorted((args.run / "wandb").glob("offline-run-*"))
    if not recorded:
        raise ValueError(f"{args.run} has no offline records: it was not run with logging.wandb=offline.")
    command = [sys.executable, "-m", "wandb", "sync", "--append", *map(str, recorded)]
    return subprocess.run(command, check=False).returncode
