"""The verb `llada status`: where runs are, and why they stopped. No torch, under a second."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llada_megatron.config import rules
from llada_megatron.config.compose import load
from llada_megatron.config.errors import BAD_INPUT, BadInput, Refusal, in_words
from llada_megatron.config.quantities import short_count
from llada_megatron.jobs import attempts
from llada_megatron.jobs.state import state_of
from llada_megatron.record import events
from llada_megatron.record.manifest import readable
from llada_megatron.record.metrics import STEP_FIELDS, read_jsonl
from llada_megatron.record.run_dir import RunDir

EXAMPLE = "llada status runs/llada2_flash"
UNREADABLE = "unreadable"


@dataclass
class Status:
    """One run."""

    name: str
    state: str
    stage: str
    block_size: int | None
    step: int
    steps: int
    tokens_per_sec: float | None
    checkpoint: int
    """Steps in the newest whole checkpoint."""
    restarts: int
    why: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="default: every run in runs/")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print a line for each run: 0, or 2 when one that was named cannot be read; BadInput without any."""
    runs = args.runs or sorted(path.parent for path in Path("runs").glob(f"**/{RunDir('').config}"))
    if not runs:
        raise BadInput("There are no runs in runs/: name a run's directory.")
    found = [_status_or_why_not(path) for path in runs]
    if args.json:
        print(json.dumps([asdict(each) for each in found], indent=1))
    else:
        _print(found)
    return BAD_INPUT if args.runs and any(each.state == UNREADABLE for each in found) else 0


def status(run_dir: Path) -> Status:
    """The status of one run, from its record and, where it was submitted, from Slurm."""
    path = RunDir(run_dir).config
    if not path.is_file():
        raise BadInput(f"{run_dir} holds no run: there is no {path.name}.")
    config = load(path)
    saved_last = readable(run_dir)[-1:]
    batches = saved_last[0].manifest.batches(config.layout.global_batch) if saved_last else ()
    try:
        schedule = rules.schedule_of(config, batches)
    except BadInput as fault:
        raise BadInput(f"{path}: {fault}") from fault
    steps = min(schedule.total_steps, config.training.steps or schedule.total_steps)
    record, last_step = events.read(run_dir), _last_record(run_dir)
    done = last_step["step"] + 1 if last_step else 0
    stage = schedule.stage_at(min(done, schedule.total_steps - 1))
    state, why = state_of(run_dir, record, steps)
    return Status(
        name=config.run.name,
        state=state,
        stage=stage.name,
        block_size=stage.block_size,
        step=done,
        steps=steps,
        tokens_per_sec=last_step.get("tokens_per_sec") if last_step else None,
        checkpoint=RunDir(run_dir).newest_step(),
        restarts=max(0, attempts.count(record) - 1),
        why=why,
    )


def _status_or_why_not(run_dir: Path) -> Status:
    """The status of a run: one that cannot be read must not hide the others."""
    try:
        return status(run_dir)
    except Refusal as error:
        why = str(error)
    except OSError as error:
        if error.errno is None:
            raise
        why = in_words(error)
    return Status(str(run_dir), UNREADABLE, "-", None, 0, 0, None, 0, 0, why)


def _last_record(run_dir: Path) -> dict[str, Any] | None:
    records = read_jsonl(RunDir(run_dir).metrics, *STEP_FIELDS)
    return records[-1] if records else None


def _print(found: list[Status]) -> None:
    rows = [("run", "state", "stage", "block", "step", "tok/s", "saved", "restarts", "why")]
    for each in found:
        step = f"{each.step}/{each.steps}"
        speed, block = short_count(each.tokens_per_sec), str(each.block_size or "-")
        rows.append(
            (each.name, each.state, each.stage, block, step, speed, str(each.checkpoint),
             str(each.restarts), each.why)
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]).rstrip())
