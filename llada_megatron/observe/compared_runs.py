"""The page of a comparison: evaluations of models and rules, and bounds of the runs that made the models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llada_megatron.config.errors import BadInput
from llada_megatron.config.quantities import short_count
from llada_megatron.observe import comparison
from llada_megatron.observe.page import to_html
from llada_megatron.observe.parts import Heading, Paragraph, Part, Table, plus_minus, to_markdown
from llada_megatron.observe.run import Run
from llada_megatron.record.json_files import write_json
from llada_megatron.record.run_dir import PAGE, RunDir

BOUNDS = (
    "Bounds on the text that each run held out, nats per token, mean ± standard error. Runs on other text are"
    " not to be compared."
)


def write_comparison(paths: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Write index.html, comparison.md, comparison.json and pictures into a folder; returns that JSON.

    paths: files of results, folders of them, or runs. Raises BadInput for what is none of these.
    """
    runs = [path for path in paths if RunDir(path).config.is_file()]
    found = comparison.compared(files_in(paths))
    stages = [stage for path in runs for stage in stages_of(path)]
    content = {**found.figures, "stages": stages}
    folder.mkdir(parents=True, exist_ok=True)
    parts = [Heading("Evaluations", level=1), *comparison.parts_of(found, folder), *_bounds(stages)]
    (folder / "comparison.md").write_text(to_markdown(parts), encoding="utf-8")
    (folder / PAGE).write_text(to_html(parts), encoding="utf-8")
    write_json(folder / "comparison.json", content)
    return content


def files_in(paths: Sequence[Path]) -> list[Path]:
    """The files, those of runs and in folders by name, each once; BadInput for a folder without any."""
    found: list[Path] = []
    for path in paths:
        is_run = RunDir(path).config.is_file()
        folder = RunDir(path).scores if is_run else path
        inside = sorted(folder.glob("*.json")) if is_run or path.is_dir() else [path]
        if not (inside or is_run):
            raise BadInput(f"{path} holds no .json file: {comparison.REMEDY}.")
        found += inside
    return list(dict.fromkeys(found))


def stages_of(run_dir: Path) -> list[dict[str, Any]]:
    """What a run says of its stages that it has evaluated: `run`, `stage`, `tokens`, `data`, `bound`."""
    run = Run.read(run_dir)
    return [
        {
            "run": str(run_dir),
            "stage": record["stage"],
            "tokens": record["stage_tokens"],
            "data": run.config.data.path,
            "bound": record["bound"],
        }
        for record in run.evaluations
        if record["bound"]
    ]


def _bounds(stages: list[dict[str, Any]]) -> list[Part]:
    if not stages:
        return []
    sizes = sorted({size for stage in stages for size in stage["bound"]}, key=int)
    rows = [
        [
            stage["run"],
            stage["stage"],
            short_count(stage["tokens"]),
            ", ".join(Path(path).name for path in stage["data"]),
            *(plus_minus(stage["bound"].get(size), "-") for size in sizes),
        ]
        for stage in stages
    ]
    header = ["run", "stage", "tokens", "data", *(f"block {size}" for size in sizes)]
    return [Heading("Likelihood after each stage"), Paragraph(BOUNDS), Table(header, rows)]
