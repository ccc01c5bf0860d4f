"""Where a step's record goes: metrics.jsonl always, the terminal, and wandb when asked."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.config.quantities import short_count
from llada_megatron.config.schema import LoggingConfig
from llada_megatron.record.metrics import MetricsFile, Record
from llada_megatron.record.run_dir import RunDir

if TYPE_CHECKING:
    import wandb
    from rich.live import Live

HEADER = (
    f"{'step':>8}  {'stage':<16} {'block':>6} {'loss':>9} {'grad':>8} {'lr':>9} {'tok/s':>7} {'tokens':>7}"
)


class Trackers:
    """Writes the records of a run; only rank 0 makes one.

    `first_step` is the step that the run does next: 0 for a new run, and after a resume the records
    from there on are dropped because they come again.
    """

    def __init__(self, run_dir: Path, logging_config: LoggingConfig, run_name: str, first_step: int) -> None:
        self._files = files = RunDir(run_dir)
        self._open(first_step)
        self._every_steps = logging_config.every_steps
        self._prometheus = files.prometheus if logging_config.prometheus else None
        self._run_name = run_name
        self._terminal = _Terminal()
        self._wandb = (
            None if logging_config.wandb == "disabled" else _start_wandb(files, logging_config, run_name)
        )

    def _open(self, first_step: int) -> None:
        self._metrics = MetricsFile(self._files.metrics, first_step)
        # An evaluation at step n was made before the checkpoint of step n, so a resume there keeps it.
        first_evaluation = first_step + 1 if first_step else 0
        self._evaluations = MetricsFile(self._files.evaluations, first_evaluation)
        self._samples = MetricsFile(self._files.samples, first_evaluation)

    def _close(self) -> None:
        for file in (self._metrics, self._evaluations, self._samples):
            file.close()

    def go_back(self, first_step: int) -> None:
        """Drop the records from a step on: they are of weights that the run has given up."""
        self._close()
        self._open(first_step)

    def log(self, record: Record) -> None:
        """Record one training step."""
        self._metrics.write(record)
        if record["step"] % self._every_steps == 0:
            self._terminal.show(record)
        self._send_to_wandb("", record)
        if self._prometheus is not None:
            aside = self._prometheus.with_name(f"{self._prometheus.name}.tmp")
            aside.write_text(prometheus_text(record, self._run_name), encoding="utf-8")
            aside.replace(self._prometheus)  # a collector never reads half of it

    def evaluation(self, record: Record) -> None:
        """Record one evaluation, whose `step` is the last step that it has seen."""
        self._evaluations.write(record)
        self._terminal.say(evaluation_line(record))
        self._send_to_wandb("evaluation/", record)

    def sample(self, record: Record) -> None:
        """Record one filled-in text, made at the same step as an evaluation."""
        self._samples.write(record)

    def close(self) -> None:
        """Close the files, the terminal's line and wandb."""
        self._terminal.close()
        self._close()
        if self._wandb is not None:
            self._wandb.finish()

    def _send_to_wandb(self, prefix: str, record: Record) -> None:
        # A resumed run repeats steps, and wandb asks for steps that never go back.
        if self._wandb is not None and record["step"] >= self._wandb.step:
            self._wandb.log(scalars(record, prefix), step=record["step"])


class _Terminal:
    """One line that is rewritten in place on a terminal; plain lines anywhere else.

    On a terminal each stage leaves its last line behind.
    """

    def __init__(self) -> None:
        self._live: Live | None = None
        self._stage: str | None = None
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(auto_refresh=False)
            self._live.start()

    def show(self, record: Record) -> None:
        last_stage, self._stage = self._stage, record["stage"]
        new_stage = last_stage != self._stage
        if self._live is None:
            print(f"{HEADER}\n{step_line(record)}" if new_stage else step_line(record), flush=True)
            return
        from rich.text import Text

        if new_stage and last_stage is not None:
            self._live.console.print(self._live.renderable)
        self._live.update(
            Text(f"{HEADER}\n", style="dim").append(step_line(record), style="not dim"), refresh=True
        )

    def say(self, line: str) -> None:
        if self._live is None:
            print(line, flush=True)
        else:
            self._live.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def step_line(record: Record) -> str:
    """A step's record as one aligned line under `HEADER`."""
    grad_norm, lr = _number(record["grad_norm"], "8.3f"), _number(record["lr"], "9.2e")
    return (
        f"{record['step']:>8}  {record['stage']:<16.16} {record['block_size']:>6}"
        f" {_number(record['loss'], '9.4f')} {grad_norm} {lr}"
        f" {short_count(record['tokens_per_sec']):>7} {short_count(record['consumed_tokens']):>7}"
    )


def evaluation_line(record: Record) -> str:
    """An evaluation's record as one line."""
    parts = [f"block {size} {_estimate(bound)}" for size, bound in record["bound"].items()]
    if record["ar"] is not None:
        parts.append(f"AR {_number(record['ar']['nll'], '.4f')}")
    line = f"evaluation after {record['stage']}, nats per token: {', '.join(parts)}"
    for size, bound in record["bound"].items():
        if own := bound.get("domains"):
            by_domain = (f"{name} {_estimate(each)}" for name, each in own.items())
            line = f"{line}\nblock {size} by domain: {', '.join(by_domain)}"
    if record.get("held_out"):
        figures = (f"{name} {_estimate(figure)}" for name, figure in record["held_out"].items())
        line = f"{line}\nheld out: {', '.join(figures)}"
    if record["block1_views"] is None:
        return line
    views = (f"{name} {_number(value, '.4f')}" for name, value in record["block1_views"].items())
    return f"{line}\nthe AR model read as block diffusion of block 1: {', '.join(views)}"


def prometheus_text(record: Record, run_name: str) -> str:
    """The numbers of a step's record as gauges in Prometheus' text format, labelled with the run."""
    label = run_name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    lines = []
    for name, value in scalars(record).items():
        if math.isfinite(value) and "/" not in name:
            lines += [f"# TYPE llada_{name} gauge", f'llada_{name}{{run="{label}"}} {float(value):.10g}']
    return "\n".join(lines) + "\n"


def scalars(record: Record, prefix: str = "") -> dict[str, float]:
    """The numbers of a nested record under flat keys (`loss_by_t/3`, `bound/4/mean`)."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            flat |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{key}"] = value
    return flat


def _estimate(estimate: Record) -> str:
    return f"{_number(estimate['mean'], '.4f')} ± {_number(estimate['se'], '.4f')}"


def _number(value: float | None, spec: str) -> str:
    width = spec.split(".")[0]
    return f"{'-':>{width}}" if value is None else f"{value:{spec}}"


def _start_wandb(files: RunDir, logging_config: LoggingConfig, run_name: str) -> wandb.Run:
    import wandb

    id_file = files.wandb_id
    if not id_file.exists():
        # Readable, and unique although wandb's ids exclude characters that names may have.
        digest = hashlib.sha256(run_name.encode()).hexdigest()[:8]
        id_file.write_text(f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', run_name)[:64]}-{digest}\n")
    mode: Any = logging_config.wandb.value  # wandb compares types too
    return wandb.init(
        project=logging_config.wandb_project,
        name=run_name,
        id=id_file.read_text().strip(),
        resume="allow" if mode == "online" else None,  # wandb ignores it offline, with a warning
        mode=mode,
        dir=files.path,
        settings=wandb.Settings(console="off"),
    )
