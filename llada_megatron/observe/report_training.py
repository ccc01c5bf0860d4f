"""What a run learnt: the bound on held-out text, the curves of training, texts that it filled in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from llada_megatron.config.families import formulas_of
from llada_megatron.config.objectives import OBJECTIVES
from llada_megatron.config.quantities import short_count
from llada_megatron.observe import comparison, plots
from llada_megatron.observe.parts import (
    LEGEND,
    NOT_YET,
    Decoded,
    Fold,
    Heading,
    Paragraph,
    Part,
    Picture,
    Table,
    Verbatim,
    plus_minus,
)
from llada_megatron.observe.run import Figures, Run
from llada_megatron.record.metrics import Record, by_stage
from llada_megatron.record.run_dir import RunDir

SAMPLES_PER_STAGE = 2


def missing(stage: Figures) -> str:
    """What a table shows where a stage of report.json has no number: that none is due, or not yet."""
    return "-" if stage["bound"] or stage["train_loss"] is not None else NOT_YET


def likelihood(run: Run, figures: Figures, folder: Path) -> list[Part]:
    sizes = sorted({size for stage in figures["stages"] for size in stage["bound"]}, key=int)
    causal = {stage.name for stage in run.schedule.stages if stage.geometry.causal}
    columns = [f"bound, block {size}" for size in sizes] or ["bound"] * run.fills_masks
    rows = []
    for stage in figures["stages"]:
        absent = missing(stage)
        bound = "-" if stage["name"] in causal else absent
        cells = [plus_minus(stage["bound"].get(size), bound) for size in sizes] or [bound] * len(columns)
        loss = absent if stage["train_loss"] is None else f"{stage['train_loss']:.4f}"
        rows.append([stage["name"], str(stage["block_size"]), short_count(stage["tokens"]), loss, *cells])
    parts: list[Part] = [
        Paragraph(
            "Nats per token, mean ± standard error. "
            + (
                "The bound is never below the negative log-likelihood."
                if columns
                else "No stage fills masks: the likelihood on held-out text is exact, and there is no bound."
            )
        ),
        Table(["stage", "block size", "tokens", "training loss", *columns], rows),
        _references(run, figures),
    ]
    evaluated = [record for record in run.evaluations if record["bound"]]
    if columns:
        parts.append(
            _picture(
                bool(evaluated),
                folder / "bound.png",
                "The bound at the end of each stage; bars are standard errors, dashed lines references.",
                lambda path: plots.plot_bound(
                    evaluated, (figures["ar"] or {}).get("nll"), figures["baselines"], path
                ),
            )
        )
    parts += _domains(evaluated, sizes) + _bits_per_byte(evaluated, sizes, run.latest("ar"))
    parts += _block1_views(run.evaluations)
    return parts + _held_out(run.evaluations)


def _references(run: Run, figures: Figures) -> Table:
    ar, baselines = run.latest("ar"), figures["baselines"] or {}
    trained = f" after {short_count(ar['tokens'])} tokens" if ar and ar["tokens"] else ""
    rows = [[f"autoregressive model{trained}, exact", plus_minus(ar and {"mean": ar["nll"], "se": ar["se"]})]]
    for name in ("bigram", "unigram"):
        value = baselines.get(name)
        rows.append([f"{name} entropy", NOT_YET if value is None else f"{value:.4f}"])
    return Table(["reference", "nats per token"], rows)


def _domains(evaluated: list[Record], sizes: list[str]) -> list[Part]:
    """The bound by domain of the held-out text, where there are several."""
    rows = []
    for record in evaluated:
        bounds = {size: record["bound"].get(size, {}).get("domains", {}) for size in sizes}
        names = dict.fromkeys(name for own in bounds.values() for name in own)
        for name in names:
            cells = [plus_minus(bounds[size].get(name), "-") for size in sizes]
            rows.append([record["stage"], name, *cells])
    if not rows:
        return []
    header = ["stage", "domain", *(f"block {size}" for size in sizes)]
    return [Paragraph("The same bound by domain of the held-out text."), Table(header, rows)]


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
            parts.append(Table([*figures], [[plus_minus(figure) for figure in figures.values()]]))
    return parts


def curves(run: Run, folder: Path) -> list[Part]:
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
            "Load of the busiest expert over the mean load of a step, and the most rows that one process's"
            " experts got of a micro-batch over their mean.",
            lambda path: plots.plot_expert_load(steps, path),
        )
        if run.config.model.experts
        else Paragraph("Expert load: the model has no experts."),
        *_layers(run, folder),
    ]


def _layers(run: Run, folder: Path) -> list[Part]:
    """Of the steps that were watched; nothing where none was asked for."""
    watched = [record for record in run.steps if "grad_norm_by_layer" in record]
    if not watched:
        return []
    newest, names = watched[-1], formulas_of(run.config.model).watched(run.config.model).parts
    rows = [
        [part, *map(_shortly, values)]
        for part, *values in zip(names, *(newest[name] for name in plots.BY_LAYER), strict=True)
    ]
    said = f"Step {newest['step']}: the largest logit is {_shortly(newest['largest_logit'])}."
    if dead := sum(count or 0 for count in newest["dead_experts_by_layer"]):
        said += f" {dead} expert{'s' * (dead > 1)} got no row of the global batch."
    return [
        _picture(
            True,
            folder / "layers.png",
            "Layers over steps, in the order of the table: 0 is the embedding, the last one the head with its"
            " norm. Dead experts are those that no row of the global batch chose.",
            lambda path: plots.plot_layers(watched, path),
        ),
        Paragraph(said),
        Fold("Every layer in that step", [Table(["part", *plots.BY_LAYER.values()], rows)]),
    ]


def _shortly(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _figures(run: Run, folder: Path) -> list[Part]:
    """A picture of each figure that an objective of the run's stages names, once there are values."""
    objectives = dict.fromkeys(stage.objective for stage in run.config.schedule.stages)
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
    return Picture.of(path, caption)


def samples(run: Run) -> list[Part]:
    """Of the newest stage at once, of the ones before it when asked for."""
    found = run.samples
    if not found:
        why = "None: no stage fills masks" if not run.fills_masks else NOT_YET.capitalize()
        return [Paragraph(f"{why}.")]
    *before, (stage, newest) = by_stage(found)
    shown: list[Part] = [Paragraph("░ is a masked token."), Heading(f"After {stage}", level=3)]
    if any(Decoded.of(record) for record in found):
        shown[1:1] = LEGEND
    folded = [Fold(f"After {name}", _samples_of(records)) for name, records in reversed(before)]
    return [*shown, *_samples_of(newest), *folded]


def _samples_of(records: list[Record]) -> list[Part]:
    parts: list[Part] = []
    for record in records[:SAMPLES_PER_STAGE]:
        for name in ("masked", "filled", "original"):
            shown = name == "filled" and Decoded.of(record)
            parts += [
                Paragraph(f"{name}, block size {record['block_size']}"),
                shown or Verbatim(record[name]),
            ]
    return parts


def tasks(run: Run, folder: Path) -> list[Part]:
    """Scores of tasks and what decoding costs in them, of the files that lie in the run's directory."""
    if run.unread:
        return [Paragraph(run.unread)]
    if run.tasks.scores:
        return comparison.parts_of(run.tasks, folder, level=3)
    command = f"llada eval {run.dir} --tasks TASK --json {RunDir(run.dir).scores}/TASK.json"
    return [Paragraph(f"{NOT_YET.capitalize()}. Made by `{command}`.")]
