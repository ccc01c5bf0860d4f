"""The report of a run, finished or not: Markdown and HTML from one list of parts, pictures, and report.json.

What a run has not produced is shown as "not yet", what its stages never produce as "-" or in a sentence.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from llada_megatron.observe import report_life, report_training
from llada_megatron.observe.page import to_html
from llada_megatron.observe.parts import Heading, Part, Table, to_markdown
from llada_megatron.observe.run import Figures, Run, figures_of
from llada_megatron.record.json_files import write_json
from llada_megatron.record.run_dir import RunDir


@dataclass
class Report:
    """What was written."""

    page: Path
    parts: list[Part]
    figures: Figures
    """The content of report.json."""


def write_report(run_dir: Path) -> Report:
    """Write report/report.md, report/index.html, the pictures and report.json.

    Raises BadInput where the directory holds no run or no step yet.
    """
    run = Run.read(run_dir)
    files = RunDir(run_dir)
    files.report.mkdir(exist_ok=True)
    figures = figures_of(run)
    parts = _parts(run, figures, files.report)
    _write(files.report / "report.md", to_markdown(parts))
    _write(files.report_page, to_html(parts))
    write_json(files.report_json, figures)
    return Report(files.report_page, parts, figures)


def _parts(run: Run, figures: Figures, folder: Path) -> list[Part]:
    """The report's content; draws the pictures into `folder`."""
    return [
        Heading(f"Run {run.config.run.name}", level=1),
        *report_life.overview(run, figures),
        Heading("Training"),
        *report_training.curves(run, folder),
        Heading("Likelihood on held-out text"),
        *report_training.likelihood(run, figures, folder),
        Heading("Tasks"),
        *report_training.tasks(run, folder),
        Heading("Samples"),
        *report_training.samples(run),
        Heading("Layout and plan"),
        *report_life.layout(run, figures),
        Heading("Cost"),
        *report_life.cost(figures),
        Heading("Events"),
        *report_life.happened(run.events),
        Heading("Versions"),
        Table(
            ["package", "version"],
            [[name, version or "absent"] for name, version in figures["versions"].items()],
        ),
    ]


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a browser may be reading it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8", errors="backslashreplace")
    aside.replace(path)
