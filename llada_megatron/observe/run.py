"""What a run's directory holds, and the figures of it that report.json, the report and the page show."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from llada_megatron.config import rules
from llada_megatron.config.compose import load
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schedule import Schedule
from llada_megatron.config.schema import Config
from llada_megatron.jobs.account import HOUR_SEC, account
from llada_megatron.jobs.cost_report import by_use
from llada_megatron.jobs.state import state_of
from llada_megatron.observe import comparison
from llada_megatron.plan.estimate import plan
from llada_megatron.plan.planner import Planner
from llada_megatron.plan.topology import check_processes
from llada_megatron.record import events
from llada_megatron.record.manifest import readable
from llada_megatron.record.metrics import STEP_FIELDS, Record, by_stage, read_jsonl, step_seconds
from llada_megatron.record.run_dir import RunDir

Figures = dict[str, Any]
"""The content of report.json."""
RECENT_STEPS = 50
"""The time that is left is told from the speed of so many steps."""


@dataclass
class Run:
    """What a run's directory holds."""

    dir: Path
    config: Config
    schedule: Schedule
    steps: list[Record]
    evaluations: list[Record]
    """The last one of each stage, in the order of the run."""
    samples: list[Record]
    events: list[events.Event]
    tasks: comparison.Compared
    """What files in RunDir.scores say."""
    unread: str = ""
    """Why those files could not be read."""
    rollbacks: tuple[list[int], ...] = ()
    """Of the newest checkpoint's manifest."""

    @classmethod
    def read(cls, run_dir: Path) -> Run:
        """Read a run's directory; raises BadInput where it holds no run or no step yet."""
        files = RunDir(run_dir)
        if not files.config.is_file():
            raise BadInput(
                f"{run_dir} is not the directory of a run: it has no {files.config.name}; give a run.dir"
            )
        steps = read_jsonl(files.metrics, *STEP_FIELDS, "mfu", "load_max_over_mean")
        if not steps:
            raise BadInput(
                f"{run_dir} has no {files.metrics.name} with a step in it; wait for the first step to end"
            )
        evaluations = read_jsonl(files.evaluations, "stage", "block_size", "bound", "block1_views")
        last_of_stage = {record["stage"]: record for record in evaluations}
        config = load(files.config)
        saved_last = readable(run_dir)[-1:]
        batches = saved_last[0].manifest.batches(config.layout.global_batch) if saved_last else ()
        tasks, unread = _tasks(files.scores)
        return cls(
            run_dir,
            config,
            rules.schedule_of(config, batches),
            steps,
            list(last_of_stage.values()),
            read_jsonl(files.samples, "block_size"),
            events.read(run_dir),
            tasks,
            unread,
            tuple(saved_last[0].manifest.rollbacks) if saved_last else (),
        )

    @property
    def fills_masks(self) -> bool:
        """Whether a stage of the schedule learns to: such stages have bounds and samples, others do not."""
        return any(not stage.geometry.causal for stage in self.schedule.stages)

    def latest(self, key: str) -> Any:
        """The newest value of `key` among the evaluations that is not null."""
        return next(
            (record[key] for record in reversed(self.evaluations) if record.get(key) is not None), None
        )


def _tasks(folder: Path) -> tuple[comparison.Compared, str]:
    """What files of results say, and why nothing where one is none."""
    try:
        return comparison.compared(sorted(folder.glob("*.json"))), ""
    except BadInput as fault:
        return comparison.compared([]), str(fault)


def figures_of(run: Run) -> Figures:
    """The content of report.json, losses in nats per token; null or empty where there is nothing yet."""
    ar = run.latest("ar")
    return {
        "schema": 1,
        "progress": _progress(run),
        "stages": [_stage(run, *stage) for stage in _stages(run)],
        "ar": ar and {"nll": ar["nll"], "tokens": ar["tokens"]},
        "baselines": run.latest("baselines"),
        "vocab_size": run.latest("vocab_size") or run.config.model.vocab_size,
        "wall_sec": run.latest("wall_sec"),
        "tasks": run.tasks.figures,
        "plan": _plan(run),
        "cost": _cost(run),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("torch", "megatron-core", "numpy", "hydra-core")},
    }


def _progress(run: Run) -> Figures:
    """Where the run is. `going`: whether more is to come, now or after a new start."""
    schedule, last = run.schedule, run.steps[-1]
    steps = min(schedule.total_steps, run.config.training.steps or schedule.total_steps)
    done, tokens = last["step"] + 1, schedule.tokens_before(steps)
    state, why = state_of(run.dir, run.events, steps)
    recent = [record["tokens_per_sec"] for record in run.steps[-RECENT_STEPS:] if record["tokens_per_sec"]]
    speed = median(recent) if recent else None
    left = max(0, tokens - last["consumed_tokens"])
    return {
        "state": state,
        "why": why,
        "complete": done >= steps,
        "going": state != "finished" and (done < steps or state == "running"),
        "stage": last["stage"],
        "block_size": last["block_size"],
        "step": done,
        "steps": steps,
        "tokens": last["consumed_tokens"],
        "total_tokens": tokens,
        "tokens_per_sec": speed,
        "remaining_sec": left / speed if speed and state == "running" else None,
        "skipped_steps": last["skipped_steps"],
        "rollbacks": [
            {
                "step": step,
                "to": to,
                "samples": [schedule.samples_before(to), schedule.samples_before(step) - 1],
            }
            for to, step in run.rollbacks
        ],
    }


def _stages(run: Run) -> list[tuple[str, int]]:
    """Name and block size of the stages: evaluated outside the schedule (`init`), then the schedule's."""
    scheduled = {stage.name: stage.block_size for stage in run.schedule.stages}
    outside = {record["stage"]: record["block_size"] for record in run.evaluations}
    return list(({name: size for name, size in outside.items() if name not in scheduled} | scheduled).items())


def _stage(run: Run, name: str, block_size: int) -> Figures:
    evaluation = next((record for record in run.evaluations if record["stage"] == name), None)
    bound = evaluation["bound"] if evaluation else {}
    return {
        "name": name,
        "block_size": block_size,
        "tokens": evaluation["stage_tokens"] if evaluation else _tokens_so_far(run.steps, name),
        "train_loss": evaluation["train_loss"] if evaluation else None,
        "bound": {
            size: {"mean": bound[size]["mean"], "se": bound[size]["se"]} for size in sorted(bound, key=int)
        },
    }


def _tokens_so_far(steps: list[Record], stage: str) -> int:
    before = 0
    for name, records in by_stage(steps):
        if name == stage:
            return records[-1]["consumed_tokens"] - before
        before = records[-1]["consumed_tokens"]
    return 0


def _plan(run: Run) -> Figures:
    """What the plan says of each stage beside what was measured; `refused`: why there is no plan."""
    planned: Figures = {}
    memory: Figures = {"planned_bytes": None, "usable_bytes": None}
    refused = None
    try:
        check_processes(run.config)
        result = plan(Planner(run.config), run.config.layout, run.schedule)
    except BadInput as fault:
        refused = str(fault)
    else:
        memory = {"planned_bytes": result.fullest.peak, "usable_bytes": result.usable_bytes}
        for stage in result.stages:
            planned[stage.name] = {
                "step_sec": stage.step_seconds,
                "tokens_per_sec": stage.tokens_per_sec,
                "mfu": stage.mfu,
            }
    measured = {name: _measured(records) for name, records in by_stage(run.steps)}
    peaks = [record["peak_memory_bytes"] for record in run.steps if record.get("peak_memory_bytes")]
    return {
        "refused": refused,
        "memory": {**memory, "measured_bytes": max(peaks, default=None)},
        "stages": [
            {"name": stage.name, "planned": planned.get(stage.name), "measured": measured.get(stage.name)}
            for stage in run.schedule.stages
        ],
    }


def _measured(records: list[Record]) -> Figures:
    """Medians over the steps of a stage."""
    values = {
        "step_sec": [step_seconds(record) for record in records if record["tokens_per_sec"]],
        "tokens_per_sec": [record["tokens_per_sec"] for record in records if record["tokens_per_sec"]],
        "mfu": [record["mfu"] for record in records if record["mfu"] is not None],
    }
    return {name: median(found) if found else None for name, found in values.items()}


def _cost(run: Run) -> Figures:
    """Device-hours and money so far; of a run without recorded attempts, those of its steps alone."""
    price = run.config.cluster.price_per_gpu_hour
    goodput, attempts = None, []
    if any(event["event"] == "started" for event in run.events):
        spent = account(run.dir, run.events)
        goodput, uses = spent.goodput, by_use(spent)
        attempts = [
            {
                "devices": each.devices,
                "queue_sec": each.queue_sec,
                "useful_sec": sum(each.useful_sec.values()),
                "sec": each.allocated_sec,
                "outcome": each.outcome,
            }
            for each in spent.attempts
        ]
    else:
        devices = run.config.layout.processes
        uses = {
            name: sum(map(step_seconds, records)) * devices / HOUR_SEC
            for name, records in by_stage(run.steps)
        }
    hours = sum(uses.values())
    return {
        "device_hours": hours,
        "by_use": uses,
        "goodput": goodput,
        "attempts": attempts,
        "price_per_device_hour": price or None,
        "money": price * hours or None,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
