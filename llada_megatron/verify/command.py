"""The verb `llada verify`: checks of this installation that a user can run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llada_megatron.verify.golden import CaseResult, GoldenReport

EXAMPLE = "llada verify golden tests/data/golden"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `llada verify`."""
    commands = parser.add_subparsers(dest="check", required=True, metavar="CHECK")
    golden = commands.add_parser("golden", help="stored numbers of the public reference code, in fp32")
    golden.add_argument("directory", type=Path, metavar="DIR", help="a checkpoint with its cases")
    golden.add_argument("--json", type=Path, metavar="FILE", help="write every difference to FILE")


def run(args: argparse.Namespace) -> int:
    """Run a check: 0 when everything agrees, 1 otherwise; raises ValueError for bad input."""
    return {"golden": _golden}[args.check](args)


def _golden(args: argparse.Namespace) -> int:
    from llada_megatron.config.schema import LayoutConfig
    from llada_megatron.parallel import groups
    from llada_megatron.verify import golden

    groups.initialize(LayoutConfig())
    try:
        report = golden.check(args.directory)
    finally:
        groups.destroy()
    _print(report, golden.TOLERANCES)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps(_as_json(report, golden.TOLERANCES), indent=2) + "\n", encoding="utf-8"
        )
    return 0 if report.passed else 1


def _as_json(report: GoldenReport, tolerances: dict[str, float]) -> dict[str, object]:
    return {
        "cases": [
            {"name": case.name, "differences": case.differences, "passed": case.passed}
            for case in report.cases
        ],
        "worst": report.worst(),
        "tolerances": tolerances,
        "not_served": report.not_served,
        "passed": report.passed,
    }


def _print(report: GoldenReport, tolerances: dict[str, float]) -> None:
    """One line per case: how far it came to its tolerance, and which quantity came closest."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("case", "", "worst quantity"):
        table.add_column(name, no_wrap=True)
    for name in ("difference", "tolerance"):
        table.add_column(name, justify="right", no_wrap=True)
    for case in report.cases:
        for quantity in case.failed() or [_closest(case, tolerances)]:
            verdict = "ok" if case.passed else "FAILED"
            table.add_row(
                case.name,
                verdict,
                quantity.replace("_", " "),
                f"{case.differences[quantity]:.1e}",
                f"{tolerances[quantity]:.0e}",
            )
    console = Console(highlight=False)
    console.print(table)
    if report.not_served:
        console.print("\nNot served yet, not counted:", ", ".join(report.not_served))
    failed = sum(not case.passed for case in report.cases)
    outcome = (
        f"{failed} of {len(report.cases)} cases failed."
        if failed
        else f"All {len(report.cases)} cases agree."
    )
    console.print(f"\n{outcome}", style="bold")


def _closest(case: CaseResult, tolerances: dict[str, float]) -> str:
    """The quantity with the largest difference relative to its tolerance; exact ones agree here."""
    return max(
        case.differences,
        key=lambda name: case.differences[name] / tolerances[name] if tolerances[name] else 0,
    )
