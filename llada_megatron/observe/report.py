"""The report of a run, finished or not: Markdown and HTML from one list of parts, pictures, and report.json.

What a run has not produced is shown as "not yet".
"""

from __future__ import annotations

import html
import importlib.metadata
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import DictConfig

from llada_megatron.config.compose import read_yaml
from llada_megatron.config.errors import BadInput
from llada_megatron.config.objectives import OBJECTIVES
from llada_megatron.config.quantities import short_count
from llada_megatron.observe import plots
from llada_megatron.record.json_files import write_json
from llada_megatron.record.metrics import STEP_FIELDS, Record, by_stage, read_jsonl
from llada_megatron.record.run_dir import RunDir

NOT_YET = "not yet"
SAMPLES_PER_STAGE = 2


@dataclass
class Heading:
    text: str
    level: int = 2


@dataclass
class Paragraph:
    text: str


@dataclass
class Table:
    header: list[str]
    rows: list[list[str]]


@dataclass
class Picture:
    file: str
    caption: str


@dataclass
class Verbatim:
    text: str


Part = Heading | Paragraph | Table | Picture | Verbatim


@dataclass
class Run:
    """What a run's directory holds."""

    config: DictConfig
    steps: list[Record]
    evaluations: list[Record]
    """The last one of each stage, in the order of the run."""
    samples: list[Record]

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
        config = read_yaml(files.config)
        return cls(config, steps, list(last_of_stage.values()), read_jsonl(files.samples, "block_size"))

    def latest(self, key: str) -> Any:
        """The newest value of `key` among the evaluations that is not null."""
        return next(
            (record[key] for record in reversed(self.evaluations) if record.get(key) is not None), None
        )


def write_report(run_dir: Path) -> Path:
    """Write report/report.md, report/index.html, the pictures and report.json; returns index.html's path.

    Raises BadInput where the directory holds no run or no step yet.
    """
    run = Run.read(run_dir)
    files = RunDir(run_dir)
    files.report.mkdir(exist_ok=True)
    parts = _parts(run, files.report)
    (files.report / "report.md").write_text(to_markdown(parts), encoding="utf-8")
    files.report_page.write_text(to_html(parts), encoding="utf-8")
    write_json(files.report_json, summary(run))
    return files.report_page


def summary(run: Run) -> dict[str, Any]:
    """The content of report.json, in nats per token; null or empty where there is nothing yet."""
    ar = run.latest("ar")
    return {
        "schema": 1,
        "stages": [_stage_summary(run, *stage) for stage in _stages(run)],
        "ar": ar and {"nll": ar["nll"], "tokens": ar["tokens"]},
        "baselines": run.latest("baselines"),
        "vocab_size": run.latest("vocab_size") or run.config.model.vocab_size,
        "wall_sec": run.latest("wall_sec"),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("torch", "megatron-core", "numpy", "hydra-core")},
    }


def _stages(run: Run) -> list[tuple[str, int]]:
    """Name and block size of the stages: evaluated outside the schedule (`init`), then the schedule's."""
    scheduled = {
        stage.name: run.config.data.sequence_length if stage.block_size == "full" else int(stage.block_size)
        for stage in run.config.schedule.stages
    }
    outside = {record["stage"]: record["block_size"] for record in run.evaluations}
    return list(({name: size for name, size in outside.items() if name not in scheduled} | scheduled).items())


def _stage_summary(run: Run, name: str, block_size: int) -> dict[str, Any]:
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


def missing(stage: dict[str, Any]) -> str:
    """What a table shows where a stage of report.json has no number: that none is due, or not yet."""
    return "-" if stage["bound"] or stage["train_loss"] is not None else NOT_YET


def _tokens_so_far(steps: list[Record], stage: str) -> int:
    before = 0
    for name, records in by_stage(steps):
        if name == stage:
            return records[-1]["consumed_tokens"] - before
        before = records[-1]["consumed_tokens"]
    return 0


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _parts(run: Run, folder: Path) -> list[Part]:
    """The report's content; draws the pictures into `folder`."""
    facts = summary(run)
    return [
        Heading(f"Run {run.config.run.name}", level=1),
        *_overview(run, facts),
        Heading("Likelihood on held-out text"),
        *_likelihood(run, facts, folder),
        Heading("Training"),
        *_training(run, folder),
        Heading("Samples"),
        *_samples(run.samples),
        Heading("Versions"),
        Table(
            ["package", "version"],
            [[name, version or "absent"] for name, version in facts["versions"].items()],
        ),
    ]


def _overview(run: Run, facts: dict[str, Any]) -> list[Part]:
    model, last = run.config.model, run.steps[-1]
    planned = sum(stage.tokens for stage in run.config.schedule.stages)
    state = (
        "The schedule is complete" if last["consumed_tokens"] >= planned else "The schedule is not complete"
    )
    speed = [record["tokens_per_sec"] for record in run.steps if record["tokens_per_sec"] is not None]
    mfu = [record["mfu"] for record in run.steps if record["mfu"] is not None]
    experts = (
        f"{model.experts} experts, {model.experts_per_token} per token" if model.experts else "no experts"
    )
    rows = [
        ["model", f"{model.layers} layers, hidden size {model.hidden_size}, {experts}"],
        ["sequence length", f"{run.config.data.sequence_length} tokens"],
        ["last step", str(last["step"])],
        ["tokens", f"{short_count(last['consumed_tokens'])} of {short_count(planned)}"],
        ["median speed", f"{short_count(median(speed))} tokens/s" if speed else NOT_YET],
        ["median MFU", f"{median(mfu):.1%}" if mfu else "unknown: `cluster` has no peak for this precision"],
        ["skipped steps", str(last["skipped_steps"])],
        ["wall time", NOT_YET if facts["wall_sec"] is None else f"{facts['wall_sec'] / 60:.1f} minutes"],
    ]
    return [
        Paragraph(f"{state}: stage {last['stage']}, block size {last['block_size']}."),
        Table(["", ""], rows),
    ]


def _likelihood(run: Run, facts: dict[str, Any], folder: Path) -> list[Part]:
    sizes = sorted({size for stage in facts["stages"] for size in stage["bound"]}, key=int)
    rows = []
    for stage in facts["stages"]:
        absent = missing(stage)
        cells = [_plus_minus(stage["bound"].get(size), absent) for size in sizes] or [absent]
        loss = absent if stage["train_loss"] is None else f"{stage['train_loss']:.4f}"
        rows.append([stage["name"], str(stage["block_size"]), short_count(stage["tokens"]), loss, *cells])
    header = [
        "stage",
        "block size",
        "tokens",
        "training loss",
        *([f"bound, block {size}" for size in sizes] or ["bound"]),
    ]
    parts: list[Part] = [
        Paragraph(
            "Nats per token, mean ± standard error. The bound is never below the negative log-likelihood."
        ),
        Table(header, rows),
        _references(run, facts),
    ]
    evaluated = [record for record in run.evaluations if record["bound"]]
    parts.append(
        _picture(
            bool(evaluated),
            folder / "bound.png",
            "The bound at the end of each stage; bars are standard errors, dashed lines references.",
            lambda path: plots.plot_bound(
                evaluated, (facts["ar"] or {}).get("nll"), facts["baselines"], path
            ),
        )
    )
    parts += _bits_per_byte(evaluated, sizes, run.latest("ar")) + _block1_views(run.evaluations)
    return parts + _held_out(run.evaluations)


def _references(run: Run, facts: dict[str, Any]) -> Table:
    ar, baselines = run.latest("ar"), facts["baselines"] or {}
    trained = f" after {short_count(ar['tokens'])} tokens" if ar and ar["tokens"] else ""
    rows = [
        [f"autoregressive model{trained}, exact", _plus_minus(ar and {"mean": ar["nll"], "se": ar["se"]})]
    ]
    for name in ("bigram", "unigram"):
        value = baselines.get(name)
        rows.append([f"{name} entropy", NOT_YET if value is None else f"{value:.4f}"])
    return Table(["reference", "nats per token"], rows)


def _bits_per_byte(evaluated: list[Record], sizes: list[str], ar: Record | None) -> list[Part]:
    if not evaluated:
        return []
    rows = []
    for record in evaluated:
        values = [record["bound"].get(size, {}).get("bits_per_byte") for size in sizes]
        rows.append([record["stage"], *("-" if value is None else f"{value:.4f}" for value in values)])
    note = f" The autoregressive model has {ar['bits_per_byte']:.4f}." if ar else ""
    return [
        Paragraph(f"The same bound in bits per byte.{note}"),
        Table(["stage", *(f"block {size}" for size in sizes)], rows),
    ]


def _block1_views(evaluations: list[Record]) -> list[Part]:
    names = ("unshifted", "shifted", "ar_from_clean_half")
    rows = [
        [record["stage"], *(f"{record['block1_views'][name]:.4f}" for name in names)]
        for record in evaluations
        if record["block1_views"] is not None
    ]
    if not rows:
        return []
    return [
        Paragraph(
            "Cross entropy at block size 1, in nats per token, by the position that the logits are read from."
        ),
        Table(["stage", "unshifted", "shifted", "autoregressive, from the clean half"], rows),
    ]


def _held_out(evaluations: list[Record]) -> list[Part]:
    """What objectives themselves say of held-out sequences, a table for each stage that says anything."""
    parts: list[Part] = []
    for record in evaluations:
        if figures := record.get("held_out"):
            parts.append(Paragraph(f"Of {record['stage']} on held-out sequences, mean ± standard error."))
            parts.append(Table([*figures], [[_plus_minus(figure) for figure in figures.values()]]))
    return parts


def _training(run: Run, folder: Path) -> list[Part]:
    steps = run.steps
    return [
        _picture(
            True,
            folder / "loss.png",
            "Training loss (thin: each step, thick: running mean of the stage) and learning rate.",
            lambda path: plots.plot_loss(steps, path),
        ),
        *_figures(run, folder),
        _picture(
            any(record["load_max_over_mean"] is not None for record in steps),
            folder / "expert_load.png",
            "Load of the busiest expert over the mean load.",
            lambda path: plots.plot_expert_load(steps, path),
        )
        if run.config.model.experts
        else Paragraph("Expert load: the model has no experts."),
    ]


def _figures(run: Run, folder: Path) -> list[Part]:
    """A picture of each figure that an objective of the run's stages names, once there are values."""
    objectives = dict.fromkeys(stage.get("objective", "diffusion") for stage in run.config.schedule.stages)
    drawn = {
        name: figure
        for objective in objectives
        if objective in OBJECTIVES
        for name, figure in OBJECTIVES[objective].figures.items()
        if figure.label
    }
    return [
        _picture(
            any(record.get(name) is not None for record in run.steps),
            folder / f"{name}.png",
            figure.title,
            partial(plots.plot_figure, run.steps, name, figure),
        )
        for name, figure in drawn.items()
    ]


def _picture(available: bool, path: Path, caption: str, draw: Callable[[Path], None]) -> Part:
    if not available:
        return Paragraph(f"{caption} {NOT_YET.capitalize()}.")
    draw(path)
    return Picture(path.name, caption)


def _samples(samples: list[Record]) -> list[Part]:
    if not samples:
        return [Paragraph(f"{NOT_YET.capitalize()}.")]
    parts: list[Part] = [Paragraph("░ is a masked token.")]
    for stage, records in by_stage(samples):
        parts.append(Heading(f"After {stage}", level=3))
        for record in records[:SAMPLES_PER_STAGE]:
            for name in ("masked", "filled", "original"):
                parts += [Paragraph(f"{name}, block size {record['block_size']}"), Verbatim(record[name])]
    return parts


def _plus_minus(estimate: Record | None, absent: str = NOT_YET) -> str:
    if estimate is None:
        return absent
    if estimate["mean"] is None:
        return "not finite"
    return f"{estimate['mean']:.4f}" + ("" if estimate["se"] is None else f" ± {estimate['se']:.4f}")


def to_markdown(parts: list[Part]) -> str:
    """The parts as Markdown (GitHub's, for the tables)."""
    return "\n\n".join(_markdown(part) for part in parts) + "\n"


def _markdown(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join(
                "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
            )
        case Picture(file, caption):
            return f"![{caption}]({file})\n\n{caption}"
        case Verbatim(text):
            longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}text\n{text}\n{fence}"


CSS = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; margin: 2em 0 .6em; }
h1 { margin-top: 0; }
.wide { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3em .9em .3em 0; text-align: left; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); }
figure { margin: 1.5em 0; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
figcaption { opacity: .75; font-size: .9em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { padding: .7em 1em; border: 1px solid var(--line); border-radius: 6px; }
""".strip()


def to_html(parts: list[Part]) -> str:
    """The parts as one page; the first heading is its title."""
    title = next(part.text for part in parts if isinstance(part, Heading))
    body = "\n".join(_html(part) for part in parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{CSS}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Table(header, rows):
            head = _html_row("th", header) if any(header) else ""
            body = "".join(_html_row("td", row) for row in rows)
            return f'<div class="wide"><table>{head}{body}</table></div>'
        case Picture(file, caption):
            text = html.escape(caption)
            image = f'<img src="{html.escape(file)}" alt="{text}">'
            return f"<figure>{image}<figcaption>{text}</figcaption></figure>"
        case Verbatim(text):
            return f"<pre>{html.escape(text)}</pre>"


def _html_row(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
