"""Evaluations side by side: the results of `llada eval`, of models and of decoding rules, as one page.

A file is lm-eval's results of one model under one decoding, with `llada` beside them: the checkpoint, the
decoding, and what it cost. Results of other lm-eval models are scores without a cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llada_megatron.observe import plots
from llada_megatron.observe.frontier import Point, aup, unweighted_aup
from llada_megatron.observe.parts import LEGEND, Decoded, Fold, Heading, Paragraph, Part, Picture, Table
from llada_megatron.record.json_files import read_json, require

REMEDY = "give files that `llada eval --json` wrote"
AUP = (
    "AUP is d3LLM's (arXiv 2601.07568): tokens per forward times accuracy of the slowest decoding, and the"
    " area from there to faster ones, accuracies weighted by min(exp(-3 (1 - y / y_max)), 1). y_max is the"
    " best of this page, and decodings that lose more than 5 points against the slowest are left out. The"
    " unweighted area is that of MBD-LMs (arXiv 2606.29215): trapezoids alone, of all decodings."
)
COSTS = {"tokens_per_forward": 2, "ms_per_forward": 1, "tokens_per_second": 1}
"""What is shown of a decoding's cost, with its decimals."""
CAPTION = "Accuracy over tokens per forward, with standard errors. AUP does not count the hollow points."


@dataclass(frozen=True)
class Score:
    """A metric of a task, of one model under one decoding."""

    model: str
    rule: str
    """Of decoding; empty for likelihoods."""
    decoding: str
    """The rule with its settings."""
    task: str
    metric: str
    """With its filter, as lm-eval names it: `exact_match,strict-match`."""
    value: float
    error: float | None
    questions: int | None
    higher_is_better: bool
    cost: dict[str, Any]
    """Of the task: tokens_per_forward, ms_per_forward, tokens_per_second, forwards by kind; or empty."""


@dataclass(frozen=True)
class Line:
    """A model under one rule with several settings, on one task."""

    model: str
    rule: str
    task: str
    metric: str
    points: list[Point]
    aup: float
    unweighted_aup: float

    @property
    def label(self) -> str:
        """What a legend says."""
        return f"{self.model}, {self.rule}"

    @property
    def areas(self) -> tuple[float, float]:
        """AUP and the unweighted area."""
        return self.aup, self.unweighted_aup


@dataclass(frozen=True)
class Answer:
    """What a model wrote under one decoding to a question of a task."""

    model: str
    decoding: str
    task: str
    said: dict[str, Any]
    """`question`, `target`, `scores` and what Decoded.of reads."""


@dataclass(frozen=True)
class Compared:
    """What files of results hold."""

    scores: list[Score]
    lines: list[Line]
    answers: list[Answer]
    """The first of each task, model and decoding."""

    @property
    def figures(self) -> dict[str, Any]:
        """Scores and frontiers in plain JSON."""
        return {
            "scores": [asdict(score) for score in self.scores],
            "frontiers": [asdict(line) for line in self.lines],
        }


def compared(paths: Sequence[Path]) -> Compared:
    """What files of results hold; BadInput for what is none."""
    scores: list[Score] = []
    answers: list[Answer] = []
    for path in paths:
        content = read_json(path, REMEDY)
        require(content, path, "results", remedy=REMEDY)
        for score in read_scores(content, path.stem):
            if score not in scores:  # likelihoods are in the files of every decoding
                scores.append(score)
        answers += read_answers(content)
    scores.sort(key=lambda score: (score.model, score.rule, score.cost.get("tokens_per_forward", 0.0)))
    return Compared(scores, lines_of(scores), answers)


def read_scores(content: dict[str, Any], name: str) -> Iterator[Score]:
    """Every metric of every task of a file's content; name: of the model where nothing says it."""
    said = content.get("llada") or {}
    decoding = said.get("decoding") or {}
    model = str(said.get("checkpoint") or content.get("model_name") or name)
    questions = content.get("n-samples", {})
    better = content.get("higher_is_better", {})
    for task, figures in content["results"].items():
        cost = said.get("cost", {}).get(task, {})
        by = decoding if "tokens_per_forward" in cost else {}
        for key, value in figures.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{kept}")
            yield Score(
                model=model,
                rule=str(by.get("rule") or ""),
                decoding=str(by.get("name") or ""),
                task=task,
                metric=key.removesuffix(",none"),
                value=float(value),
                error=float(error) if isinstance(error, int | float) else None,
                questions=questions.get(task, {}).get("effective"),
                higher_is_better=bool(better.get(task, {}).get(metric, True)),
                cost=cost,
            )


def read_answers(content: dict[str, Any]) -> Iterator[Answer]:
    """Answers for the eye; files of other lm-eval models have none."""
    said = content.get("llada") or {}
    for task, answers in said.get("shown", {}).items():
        for answer in answers:
            yield Answer(str(said["checkpoint"]), str(said["decoding"]["name"]), task, answer)


def lines_of(scores: Sequence[Score]) -> list[Line]:
    """One line for each task and metric, model and rule whose tokens per forward are known.

    Metrics are shares, higher ones better. A task's metrics follow each other in lm-eval's order.
    """
    groups: dict[tuple[str, str, str, str], list[Point]] = {}
    best: dict[tuple[str, str], float] = {}
    for score in scores:
        speed = score.cost.get("tokens_per_forward")
        if not score.higher_is_better or not 0 <= score.value <= 1 or speed is None:
            continue
        percent = 100 * score.value
        best[score.task, score.metric] = max(percent, best.get((score.task, score.metric), 0.0))
        point = Point(speed, percent, None if score.error is None else 100 * score.error, score.decoding)
        groups.setdefault((score.task, score.metric, score.model, score.rule), []).append(point)
    return [
        Line(model, rule, task, metric, points, aup(points, best[task, metric]), unweighted_aup(points))
        for (task, metric, model, rule), points in groups.items()
    ]


def parts_of(found: Compared, folder: Path, level: int = 2) -> list[Part]:
    """Tables, pictures and answers by task, under headings of a level; draws the pictures into `folder`."""
    parts: list[Part] = []
    for task in dict.fromkeys(score.task for score in found.scores):
        parts.append(Heading(task, level))
        of_task = [line for line in found.lines if line.task == task]
        if of_task:
            # The first metric is the one by which the task is known.
            shown = [line for line in of_task if line.metric == of_task[0].metric]
            picture = folder / f"frontier-{_file_name(task)}.png"
            named = [(f"{line.label} (AUP {line.aup:.1f})", line.points) for line in shown]
            plots.plot_frontier(named, shown[0].metric, picture)
            parts += [Picture.of(picture, CAPTION), _table_of_lines(of_task)]
        parts.append(_table_of_scores([score for score in found.scores if score.task == task]))
        if answers := [answer for answer in found.answers if answer.task == task]:
            parts.append(Fold("Answers", _answers(answers)))
    return [*parts, Paragraph(AUP)] if found.lines else parts


def _answers(answers: list[Answer]) -> list[Part]:
    """Each question once, under it what each model wrote under each decoding."""
    parts: list[Part] = [*LEGEND]
    for question in dict.fromkeys(answer.said["question"] for answer in answers):
        mine = [answer for answer in answers if answer.said["question"] == question]
        parts.append(Paragraph(f"{question} (right: {mine[0].said['target']})"))
        for answer in mine:
            scores = ", ".join(f"{name} {value:g}" for name, value in answer.said["scores"].items())
            parts.append(Paragraph(f"{answer.model}, {answer.decoding}: {scores}"))
            parts += [decoded] if (decoded := Decoded.of(answer.said)) else []
    return parts


def _table_of_scores(scores: list[Score]) -> Table:
    """A row for each model and decoding, its metrics side by side."""
    lower = {score.metric for score in scores if not score.higher_is_better}
    metrics = [*dict.fromkeys(score.metric for score in scores)]
    header = [metric + (" (lower is better)" if metric in lower else "") for metric in metrics]
    header = [
        "model",
        "decoding",
        *header,
        "questions",
        "tokens/forward",
        "ms/forward",
        "tokens/s",
        "forwards",
    ]
    rows = []
    for model, decoding in dict.fromkeys((score.model, score.decoding) for score in scores):
        mine = {score.metric: score for score in scores if (score.model, score.decoding) == (model, decoding)}
        first = next(iter(mine.values()))
        cost = first.cost
        forwards = ", ".join(f"{count} {kind}" for kind, count in cost.get("forwards", {}).items() if count)
        rows.append(
            [
                model,
                decoding or "-",
                *(_with_error(mine[metric]) if metric in mine else "-" for metric in metrics),
                "-" if first.questions is None else str(first.questions),
                *(f"{cost[name]:.{digits}f}" if name in cost else "-" for name, digits in COSTS.items()),
                forwards or "-",
            ]
        )
    return Table(header, rows)


def _with_error(score: Score) -> str:
    return f"{score.value:.4f}" + ("" if score.error is None else f" ± {score.error:.4f}")


def _table_of_lines(lines: list[Line]) -> Table:
    header = ["model", "rule", "metric", "decodings", "AUP", "unweighted area"]
    return Table(
        header,
        [
            [
                line.model,
                line.rule,
                line.metric,
                f"{len(line.points)}",
                *(f"{area:.1f}" for area in line.areas),
            ]
            for line in lines
        ],
    )


def _file_name(task: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in task)
