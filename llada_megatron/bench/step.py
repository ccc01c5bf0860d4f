"""Seconds and peak memory per training step for AR, MDLM and BDLM at equal L, against their FLOPs.

All cases train one model in interleaved rounds, so that a busy machine slows them alike. Under a layout of
several processes that is all. In one process each case's memory is measured too, in a process of its own, and
there are checks: the BDLM / MDLM ratio of time against that of the FLOPs that the executors perform, and the
share of a step spent outside megatron-core.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llada_megatron.config import rules
from llada_megatron.config.compose import compose, tree_of
from llada_megatron.config.flops import training_flops_per_sequence
from llada_megatron.config.last_layer import drops_clean_rows
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import Config
from llada_megatron.data.corpus import read_index
from llada_megatron.data.shards import prefixes_of
from llada_megatron.record.json_files import write_json
from llada_megatron.runtime.launch import already_started, launch

RATIO_TOLERANCE = 0.10
OVERHEAD_LIMIT = 0.03
PRELOAD = "llada_megatron.training.loop"
FULL_LOGITS, CLEAN_ROWS = "full logits", "clean rows to the end"


@dataclass
class Case:
    """Measurements of one kind of step."""

    name: str
    seconds: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    """Seconds of each step spent outside megatron-core's forward, backward and optimizer."""
    flops: float = 0.0
    visible_flops: float = 0.0
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def times(self) -> dict[str, Any]:
        """Seconds of a step, for JSON."""
        return {
            "name": self.name,
            "seconds": self.median,
            "seconds_min": min(self.seconds),
            "seconds_max": max(self.seconds),
        }


def run(overrides: list[str], *, rounds: int, json_file: Path | None) -> int:
    """Measure, print, and return 0 when both checks hold, 1 otherwise."""
    config = compose(["experiment=bench", *overrides])
    rules.check(config)
    cases = on_every_rank(_time, config, rounds)
    if cases is None:
        return 0
    report = described(config, str(read_index(prefixes_of(config.data.path[0])[0]).log_normal))
    if config.layout.processes > 1:
        report |= {"cases": [case.times() for case in cases], "checks": []}
    else:
        for case in cases:
            case.peak_bytes = launch(_peak_bytes, config, case.name, processes=1, preload=PRELOAD)[0]
        report |= _report(cases)
    return finish(report, json_file)


def on_every_rank(
    time: Callable[[Config, int], list[Case]], config: Config, rounds: int
) -> list[Case] | None:
    """What `time` measures on the first of the layout's ranks; None on the others of somebody's launcher."""
    if already_started():  # by srun or torchrun, on as many nodes as it takes
        cases = time(config, rounds)
        return cases if os.environ["RANK"] == "0" else None
    return launch(time, config, rounds, processes=config.layout.processes, preload=PRELOAD)[0]


def finish(report: dict[str, Any], json_file: Path | None) -> int:
    """Print and write a report; 0 when its checks hold, 1 otherwise."""
    _print(report)
    write_json(json_file, report)
    return 0 if all(check["passed"] for check in report["checks"]) else 1


def _trainer(config: Config) -> Any:
    from llada_megatron.parallel import groups
    from llada_megatron.training.loop import build_trainer

    groups.initialize(config.layout, threads=config.training.threads)
    return build_trainer(config, rules.schedule_of(config))


def _cases(config: Config) -> dict[str, tuple[Stage, str]]:
    """Stage of each case, and what it computes besides what it needs: nothing, or one of the two names."""
    stages = {stage.name: stage for stage in rules.schedule_of(config).stages}
    cases = {name: (stage, "") for name, stage in stages.items()}
    if config.layout.processes == 1:
        cases[f"bdlm, {FULL_LOGITS}"] = (stages["bdlm"], FULL_LOGITS)
        if drops_clean_rows(config, config.layout):
            cases[f"bdlm, {CLEAN_ROWS}"] = (stages["bdlm"], CLEAN_ROWS)
    return cases


def _time(config: Config, rounds: int) -> list[Case]:
    """Every rank returns the same: a step takes as long as its slowest rank."""
    from llada_megatron.parallel import ranks

    trainer = _trainer(config)
    cases = {name: Case(name) for name in _cases(config)}
    for turn in range(rounds + 1):  # the first round warms up
        for name, (stage, besides) in _cases(config).items():
            ranks.barrier()
            seconds, outside = max(ranks.gathered(_step(trainer, stage, turn, besides)))
            if turn:
                cases[name].seconds.append(seconds)
                cases[name].outside.append(outside)
            elif config.layout.processes == 1:
                cases[name].flops, cases[name].visible_flops = _flops(trainer, stage, besides)
    return list(cases.values())


def _peak_bytes(config: Config, name: str) -> int:
    """Peak resident memory that two steps of a case add to that of the built trainer."""
    from llada_megatron.runtime import device

    trainer = _trainer(config)
    before = device.peak_memory_bytes()
    stage, besides = _cases(config)[name]
    for turn in range(2):
        _step(trainer, stage, turn, besides)
    return device.peak_memory_bytes() - before


def _step(trainer: Any, stage: Stage, turn: int, besides: str) -> tuple[float, float]:
    """Seconds of one step, and of its part outside megatron-core."""
    from llada_megatron.bench.timed import timed_step

    options = {"full_logits": besides == FULL_LOGITS, "clean_rows": besides == CLEAN_ROWS}
    return timed_step(trainer, stage.first_step + turn, **options)


def _flops(trainer: Any, stage: Stage, besides: str) -> tuple[float, float]:
    """FLOPs of a step that the executor performs, and that the visible pairs need."""
    from llada_megatron.attention.tiles import performed_pairs
    from llada_megatron.training.step import micro_batches

    config, objective = trainer.config, trainer.objectives[stage.objective]
    model, full_logits = config.model, besides == FULL_LOGITS
    performed = visible = 0.0
    for batch in micro_batches(trainer, objective, stage, stage.first_step, 0.0):
        inputs = batch.inputs
        samples, positions = inputs.tokens.shape
        drops = inputs.noisy_outputs and not besides and drops_clean_rows(config, config.layout)
        rows = inputs.tokens.numel() if full_logits else len(inputs.outputs)
        common = dict(
            positions=positions * samples,
            last_positions=positions * samples // (2 if drops else 1),
            supervised=rows,
            head_recomputed=not full_logits and rows > model.head_chunk_tokens,
        )
        performed += training_flops_per_sequence(model, pairs=performed_pairs(inputs.keys.mask), **common)
        visible += training_flops_per_sequence(model, pairs=inputs.keys.mask.visible_pairs(), **common)
    return performed, visible


def described(config: Config, documents: str) -> dict[str, Any]:
    """What was measured, on what; `llada plan calibrate` reads the documents' lengths and the config."""
    from llada_megatron.runtime import device

    model = config.model
    return {
        "model": f"{model.layers} layers, hidden size {model.hidden_size}, vocabulary {model.vocab_size}",
        "device": device.name(),
        "threads": device.threads(),
        "tokens_per_step": rules.schedule_of(config).tokens_of(0),
        "documents": documents,
        "config": tree_of(config),
    }


def _report(cases: list[Case]) -> dict[str, Any]:
    by_name = {case.name: case for case in cases}
    bdlm, mdlm, full = by_name["bdlm"], by_name["mdlm"], by_name[f"bdlm, {FULL_LOGITS}"]
    paired = [b / m for b, m in zip(bdlm.seconds, mdlm.seconds, strict=True)]
    time_ratio, flops_ratio = statistics.median(paired), bdlm.flops / mdlm.flops
    overhead = max(statistics.median(case.outside) / case.median for case in (bdlm, mdlm))
    return {
        "cases": [
            case.times()
            | {
                "peak_bytes": case.peak_bytes,
                "performed_flops": case.flops,
                "visible_flops": case.visible_flops,
                "outside_share": statistics.median(case.outside) / case.median,
            }
            for case in cases
        ],
        "checks": [
            {
                "name": "BDLM / MDLM time over FLOPs",
                "time_ratio": time_ratio,
                "flops_ratio": flops_ratio,
                "bound": RATIO_TOLERANCE,
                "passed": abs(time_ratio / flops_ratio - 1) <= RATIO_TOLERANCE,
            },
            {
                "name": "share of a step outside megatron-core",
                "value": overhead,
                "bound": OVERHEAD_LIMIT,
                "passed": overhead <= OVERHEAD_LIMIT,
            },
            {
                "name": "masked-only head saves time and memory",
                "seconds_saved": full.median - bdlm.median,
                "bytes_saved": full.peak_bytes - bdlm.peak_bytes,
                "passed": full.median > bdlm.median and full.peak_bytes > bdlm.peak_bytes,
            },
        ],
    }


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    layout, length = report["config"]["layout"], report["config"]["data"]["sequence_length"]
    console.print(
        f"{report['model']}; L = {length}; {report['tokens_per_step']} tokens a step;"
        f" {layout['processes']} x {report['threads']} threads, {report['device']}",
        soft_wrap=True,
    )
    columns = {
        "s/step": lambda case: f"{case['seconds']:.3f}",
        "min": lambda case: f"{case['seconds_min']:.3f}",
        "max": lambda case: f"{case['seconds_max']:.3f}",
    }
    if "peak_bytes" in report["cases"][0]:
        columns |= {
            "peak MiB": lambda case: f"{case['peak_bytes'] / 2**20:.0f}",
            "GFLOP": lambda case: f"{case['performed_flops'] / 1e9:.1f}",
            "visible": lambda case: f"{case['visible_flops'] / 1e9:.1f}",
            "outside": lambda case: f"{case['outside_share']:.1%}",
        }
    table = Table("case", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right")
    for case in report["cases"]:
        table.add_row(case["name"], *(shown(case) for shown in columns.values()))
    console.print(table)
    for check in (*report["checks"], *report.get("figures", [])):
        figures = ", ".join(
            f"{key} {value:.4g}"
            for key, value in check.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        )
        verdict = {True: "ok  ", False: "FAIL", None: "    "}[check.get("passed")]
        console.print(f"{verdict}  {check['name']}: {figures}", soft_wrap=True)
