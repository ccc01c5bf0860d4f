"""The verb `llada sync`: upload what was recorded for wandb offline, from a node that has a way out."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from llada_megatron.config.errors import BadInput
from llada_megatron.record.run_dir import RunDir

EXAMPLE = "llada sync runs/llada2_flash"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", type=Path, metavar="RUN")


def run(args: argparse.Namespace) -> int:
    """Upload each attempt's record under the run's one id: wandb's exit code; BadInput without any."""
    recorded = sorted(RunDir(args.run).wandb.glob("offline-run-*"))
    if not recorded:
        raise BadInput(f"{args.run} has no offline records: it was not run with logging.wandb=offline.")
    command = [sys.executable, "-m", "wandb", "sync", "--append", *map(str, recorded)]
    return subprocess.run(command, check=False).returncode
