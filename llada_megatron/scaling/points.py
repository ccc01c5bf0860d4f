"""Points of a scaling law: the ends of runs, and lines of a file.

A run gives one point, at the end of its schedule. Evaluations before it were made at a learning rate that had
not come down, so their losses lie above those of runs which ended there: a law fitted to them takes that
for a want of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llada_megatron.config import rules
from llada_megatron.config.compose import load
from llada_megatron.config.contents import Coarse
from llada_megatron.config.errors import BadInput
from llada_megatron.config.families import formulas_of
from llada_megatron.config.flops import model_flops_per_token
from llada_megatron.config.foreign import parse_json, read_bytes
from llada_megatron.config.parameters import active_parameters, total_parameters
from llada_megatron.config.quantities import short_count
from llada_megatron.config.schedule import Schedule, block_size_of
from llada_megatron.config.schema import Config, ModelConfig
from llada_megatron.record.manifest import readable
from llada_megatron.record.metrics import Record, read_jsonl
from llada_megatron.record.run_dir import RunDir
from llada_megatron.scaling.laws import CHINCHILLA, DLCM, Columns, Law

LARGEST = 1e30
"""Of a figure in a file of points, below what overflows."""
DECAYED = 0.5
"""A learning rate that ends above this share of its largest had not come down."""
PARSED, LAST_STEPS = 1.2, 10
"""Concepts, of the last recorded steps or held-out text, that are off R by more than this factor are said."""
FLOPS_PER_PARAMETER = 6.0
"""Of a token in training and a parameter that it passes: what points of a file are taken to cost, as in arXiv
2203.15556."""
CONCEPT_HABITS = ("concept", "boundary_grad", "sharpening", "parser_weight", "mup_base_hidden_size")
"""Of `model.concepts`, what may shift a loss and is no variable of the law."""
POINTS_REMEDY = (
    'give a line of JSON for each point, {"N": 1e8, "D": 2e9, "loss": 3.1} or with "R" and "P" too'
)


@dataclass(frozen=True)
class Point:
    """One run's size, tokens and loss."""

    name: str
    variables: dict[str, float]
    """N, D; of DLCM R and P too."""
    loss: float
    """Nats per token."""
    error: float | None = None
    """Standard error of the loss over held-out text."""
    flops_per_token: float | None = None
    traits: dict[str, Any] = field(default_factory=dict)
    """What must be alike among the points of a law, by its name for people."""
    habits: dict[str, Any] = field(default_factory=dict)
    """What had better be alike."""
    concept_length: float | None = None
    """Of DLCM: tokens per concept that its rule opens on held-out text."""
    remarks: list[str] = field(default_factory=list)
    """Sentences on what makes its loss less sure."""

    @property
    def flops(self) -> float:
        """Of its training."""
        each = self.flops_per_token or FLOPS_PER_PARAMETER * passed(self.variables)
        return each * self.variables["D"]


def passed(variables: Mapping[str, float]) -> float:
    """Parameters that a token passes: N, but of DLCM's backbone one token in R does."""
    share = variables.get("P", 0.0)
    return variables["N"] * (1 - share + share / variables.get("R", 1.0))


@dataclass(frozen=True)
class Counting:
    """Which parameters N counts."""

    active: bool = False
    """Those that one token has to do with; otherwise all."""
    embedding: bool = True
    """The embedding and the head too."""

    def __call__(self, model: ModelConfig) -> int:
        """N of a model."""
        counted = active_parameters(model) if self.active else total_parameters(model)
        return counted if self.embedding else counted - _tables(model)

    def coarse(self, model: ModelConfig, part: Coarse) -> int:
        """Those of N that are of the part that fewer rows pass: all experts are its."""
        return part.parameters - (total_parameters(model) - active_parameters(model) if self.active else 0)

    def __str__(self) -> str:
        kind = "active" if self.active else "all"
        return f"{kind} parameters" if self.embedding else f"{kind} parameters but the embedding and the head"


def _tables(model: ModelConfig) -> int:
    return model.vocab_size * model.hidden_size * (1 if model.tied_head else 2)


def columns_of(law: Law, points: Sequence[Point]) -> Columns:
    """The variables of a law at points, [n] each."""
    return {name: np.array([point.variables[name] for point in points]) for name in law.variables}


def read_runs(runs: Sequence[Path], loss: str, counting: Counting) -> tuple[Law, str, list[Point]]:
    """The law of their family, what the loss is called, and the point of each run.

    loss: `ar`, `bound:SIZE`, or empty for what the first run was trained to. Raises BadInput for what is no
    run, one that has not ended, one without this loss, and one that must not be compared with the first.
    """
    points: list[Point] = []
    for run in runs:
        loss, point = _read(run, loss, counting)
        for name, value in point.traits.items():
            if points and points[0].traits[name] != value:
                raise BadInput(
                    f"{run} differs from {runs[0]} in its {name}: one law is about runs that differ in"
                    f" {', '.join(points[0].variables)} alone, leave one of them out."
                )
        points.append(point)
    return DLCM if "R" in points[0].variables else CHINCHILLA, loss, points


def _read(run: Path, loss: str, counting: Counting) -> tuple[str, Point]:
    files = RunDir(run)
    if not files.config.is_file():
        raise BadInput(f"{run} is not the directory of a run: it has no {files.config.name}; give a run.dir")
    config, saved = load(files.config), readable(run)[-1:]
    batches = saved[0].manifest.batches(config.layout.global_batch) if saved else ()
    schedule = rules.schedule_of(config, batches)
    if config.model.lora.rank:
        raise BadInput(f"{run} trains adapters: N of a law counts what a run trains, leave it out.")
    evaluations = read_jsonl(files.evaluations, "stage", "consumed_tokens", "bound", "block_size")
    last = evaluations[-1] if evaluations else None
    if last is None or last["consumed_tokens"] < schedule.total_tokens:
        seen = (
            f"its last evaluation is after {short_count(last['consumed_tokens'])}" if last else "it has none"
        )
        raise BadInput(
            f"{run} has no evaluation at the end of its {short_count(schedule.total_tokens)} tokens ({seen}):"
            " let it end, or leave it out; before the end the learning rate had not come down."
        )
    loss = loss or (f"bound:{last['block_size']}" if last["bound"] else "ar")
    mean, error = _loss_of(run, last, loss)
    start = config.checkpoint.init_from or (saved and saved[0].manifest.autoregressive_tokens)
    point = Point(
        str(run),
        _variables(config.model, schedule, counting),
        mean,
        error,
        _flops_per_token(config, schedule),
        traits=_traits(config.model, last, schedule, starts_from_weights=bool(start)),
        habits=_habits(config, saved[0].manifest.data_fingerprint if saved else None),
        concept_length=(last.get("held_out") or {}).get("tokens_per_concept", {}).get("mean"),
        remarks=_remarks(run, config.model, read_jsonl(files.metrics, "step")),
    )
    return loss, point


def _variables(model: ModelConfig, schedule: Schedule, counting: Counting) -> dict[str, float]:
    """N and D. Of DLCM also R as it was set, which is known before a run and what its parser holds over the
    batches, and P.
    """
    size = counting(model)
    found = {"N": float(size), "D": float(schedule.total_tokens)}
    if part := formulas_of(model).coarse(model):
        found |= {"R": part.tokens_per_row, "P": counting.coarse(model, part) / size}
    return found


def _loss_of(run: Path, record: Record, loss: str) -> tuple[float, float | None]:
    """Mean and standard error of a loss in an evaluation."""
    bounds = record["bound"]
    there = [*(["ar"] if record.get("ar") else []), *(f"bound:{size}" for size in sorted(bounds, key=int))]
    kind, _, text = loss.partition(":")
    if kind == "ar" and not text:
        found, name = record.get("ar") or {}, "nll"
    elif kind == "bound" and text:
        length = int(record.get("sequence_length") or record["block_size"])
        found, name = bounds.get(str(block_size_of(text, length, "--loss bound"))) or {}, "mean"
    else:
        raise BadInput(f"--loss {loss} is unknown: give ar, or bound and a block size, as bound:32.")
    value = found.get(name)
    if not isinstance(value, int | float) or value <= 0:
        raise BadInput(
            f"{run} has no loss {loss} at its end, but {', '.join(there) or 'none'}: choose --loss among"
            " these, or evaluate that block size (evaluation.block_sizes)."
        )
    return float(value), found.get("se")


def _flops_per_token(config: Config, schedule: Schedule) -> float:
    """Of training, the mean over a run's tokens."""
    flops = sum(model_flops_per_token(config, stage) * stage.tokens for stage in schedule.stages)
    return flops / schedule.total_tokens


def _traits(
    model: ModelConfig, record: Record, schedule: Schedule, *, starts_from_weights: bool
) -> dict[str, Any]:
    entropies = record.get("baselines") or {}
    return {
        "family of models": model.family,
        "vocabulary": record.get("vocab_size"),
        # Entropies of the held-out text in tokens: another text or tokenizer has others.
        "held-out text or tokenizer": {name: round(value, 6) for name, value in entropies.items()},
        "sequence length": [stage.sequence_length for stage in schedule.stages],
        "objectives and block sizes": [(stage.objective, stage.block_size) for stage in schedule.stages],
        "start (from weights, or from nothing)": starts_from_weights,
    }


def _habits(config: Config, fingerprint: dict[str, Any] | None) -> dict[str, Any]:
    experts = (config.model.experts, config.model.experts_per_token) if config.model.has_experts else None
    concepts = config.model.concepts
    return {
        "training data": json.dumps(
            fingerprint or [list(config.data.path), config.data.split], sort_keys=True
        ),
        "held-out sequences and draws": (config.evaluation.sequences, config.evaluation.draws),
        "decay of the learning rate": str(config.optimizer.decay_style),
        "experts": experts,
        "boundaries and concepts": tuple(str(getattr(concepts, name)) for name in CONCEPT_HABITS),
    }


def _remarks(run: Path, model: ModelConfig, steps: Sequence[Record]) -> list[str]:
    """Sentences where the learning rate had not come down at a run's end, or a parser did not hold R."""
    found = []
    rates = [record["lr"] for record in steps if record.get("lr")]
    if rates and rates[-1] > DECAYED * max(rates):
        found.append(
            f"{run}: the learning rate ended at {rates[-1] / max(rates):.0%} of its largest, so its loss"
            " is not what it would have ended at."
        )
    opened = [record["boundary_rate"] for record in steps[-LAST_STEPS:] if record.get("boundary_rate")]
    R, length = model.concepts.tokens_per_concept, 1 / np.mean(opened) if opened else 0.0
    if opened and not R / PARSED <= length <= R * PARSED:
        found.append(f"{run}: its concepts ended {length:.1f} tokens long, and the law takes R = {R:g}.")
    return found


def remarks_on(points: Sequence[Point]) -> list[str]:
    """What of the points makes a law less sure, in sentences."""
    found = [remark for point in points for remark in point.remarks]
    ratios = [point.concept_length / point.variables["R"] for point in points if point.concept_length]
    if ratios and (max(ratios) > PARSED or min(ratios) < 1 / PARSED):
        found.append(
            f"On held-out text concepts are {min(ratios):.2g} to {max(ratios):.2g} times as long as R,"
            " which is what the parser aims at in training."
        )
    for name in points[0].habits:
        values: list[Any] = []
        for point in points:
            if point.habits[name] not in values:
                values.append(point.habits[name])
        if len(values) > 1:
            found.append(
                f"The runs differ in {name}: part of what the law says of size or tokens may be that."
            )
    return found


def read_points(file: Path) -> tuple[Law, list[Point], list[Point]]:
    """The law that a file's lines are about, its points, and those with `"held_out": true`.

    Raises BadInput for a line that is no point.
    """
    records = list(_lines(file))
    if not records:
        raise BadInput(f"{file} has no line: {POINTS_REMEDY}.")
    law = DLCM if any(name in records[0][1] for name in ("R", "P")) else CHINCHILLA
    points: list[Point] = []
    held_out: list[Point] = []
    for number, record in records:
        others = [name for name in ("R", "P") if record.get(name) is not None]
        if others and law is not DLCM:
            raise BadInput(
                f"line {number} of {file} has {others[0]}, and the lines before have none: one law is fitted"
                " to all."
            )
        if unknown := record.keys() - {*law.variables, "loss", "held_out"}:
            raise BadInput(f"line {number} of {file} has {min(unknown)!r}: {POINTS_REMEDY}.")
        is_held_out = record.get("held_out", False)
        if not isinstance(is_held_out, bool):
            raise BadInput(f"line {number} of {file} has held_out={is_held_out!r}: it is true or false.")
        variables = {name: _positive(record, name, file, number) for name in law.variables}
        if variables.get("P", 0.5) >= 1:
            raise BadInput(f"line {number} of {file} has P={variables['P']}: it is a share, between 0 and 1.")
        point = Point(f"line {number}", variables, _positive(record, "loss", file, number))
        (held_out if is_held_out else points).append(point)
    return law, points, held_out


def _lines(file: Path) -> Iterator[tuple[int, Record]]:
    """Numbers and objects of the lines that are not empty; BadInput for any other line."""
    for number, line in enumerate(read_bytes(file, POINTS_REMEDY).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise BadInput(f"line {number} of {file} holds no JSON object: {POINTS_REMEDY}.")
        yield number, record


def _positive(record: Record, name: str, file: Path, number: int) -> float:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGEST:
        said = "has no" if value is None else f"has {value!r} as"
        raise BadInput(f"line {number} of {file} {said} {name}: {POINTS_REMEDY}.")
    return float(value)
