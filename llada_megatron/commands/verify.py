"""The verb `llada verify`: checks of this installation that a user can run."""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.config.choices import Core
from llada_megatron.config.errors import BadInput
from llada_megatron.record.json_files import write_json

if TYPE_CHECKING:
    from llada_megatron.verify.comparison import LayoutReport
    from llada_megatron.verify.golden import CaseResult, GoldenReport

EXAMPLE = "llada verify golden tests/golden"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `llada verify`."""
    commands = parser.add_subparsers(dest="check", required=True, metavar="CHECK")
    golden = commands.add_parser("golden", help="stored numbers of the public reference code, in fp32")
    golden.add_argument("directory", type=Path, metavar="DIR", help="cases, with their checkpoint or without")
    golden.add_argument(
        "--model", type=Path, metavar="DIR", help="their checkpoint; default: DIR, else golden beside it"
    )
    golden.add_argument(
        "--core", type=Core, choices=list(Core), default=Core.gpt, help="model.core; default gpt"
    )
    golden.add_argument("--json", type=Path, metavar="FILE", help="write every difference to FILE")
    layouts = commands.add_parser("layouts", help="parallel layouts against one process, trained here")
    layouts.add_argument("names", nargs="*", metavar="NAME", help="layouts such as CP2; default: all of them")
    layouts.add_argument("--json", type=Path, metavar="FILE", help="write every difference to FILE")
    resume = commands.add_parser("resume", help="a run killed, stopped and resumed, against one left alone")
    resume.add_argument("overrides", nargs="*", metavar="KEY=VALUE", default=["experiment=parity"])
    resume.add_argument("--to", nargs="+", metavar="KEY=VALUE", default=[], help="resume under this layout")
    resume.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the moments; default 0")
    resume.add_argument("--json", type=Path, metavar="FILE", help="write the certificate to FILE")
    context = commands.add_parser("context", help="what context parallelism does to a packed sequence")
    documents = context.add_mutually_exclusive_group(required=True)
    documents.add_argument("--docs", metavar="N,N,...", help="lengths of the documents in tokens")
    documents.add_argument("--lognormal", metavar="MU,SIGMA,SEED", help="draw the lengths; needs --length")
    context.add_argument("--length", type=int, metavar="L", help="tokens of the sequence for --lognormal")
    context.add_argument("--block-size", type=int, required=True, metavar="N")
    context.add_argument("--block-grid", choices=("sequence", "document"), default="sequence")
    context.add_argument("--cp", type=int, required=True, metavar="R", help="ranks; as many processes start")
    context.add_argument(
        "--kv-heads", type=int, default=4, metavar="N", help="default 4, as in mini and flash"
    )
    context.add_argument("--head-dim", type=int, default=128, metavar="N", help="default 128, likewise")
    context.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")


def run(args: argparse.Namespace) -> int:
    """Run a check: 0 when everything agrees, 1 otherwise; raises BadInput for bad input."""
    checks = {"golden": _golden, "layouts": _layouts, "resume": _resume, "context": _context}
    return checks[args.check](args)


def _resume(args: argparse.Namespace) -> int:
    from llada_megatron.verify import resume

    certificate = resume.check(args.overrides, args.to, seed=args.seed)
    for each in certificate.interruptions:
        print(f"{each.kind:<18} after step {each.after_step}, went on from step {each.resumed_from}")
    for name in ("steps", "bitwise", "max_rel", "same_samples", "same_noise"):
        print(f"{name:<18} {getattr(certificate, name)}")
    verdict = "trains the same model." if certificate.passed else "trains ANOTHER model."
    print(f"\nThe interrupted run {verdict}")
    write_json(args.json, certificate.as_json())
    return 0 if certificate.passed else 1


def _context(args: argparse.Namespace) -> int:
    from llada_megatron.data.synthetic import log_normal_documents
    from llada_megatron.verify import context

    if args.docs:
        lengths = _numbers("--docs", args.docs, int)
        cu_seqlens = [0, *itertools.accumulate(lengths)]
    else:
        if args.length is None:
            raise BadInput("--lognormal needs --length: say how many tokens the sequence has.")
        mu, sigma, seed = _numbers("--lognormal", args.lognormal, float, count=3)
        if args.length < 1 or not (sigma >= 0 and seed >= 0 and math.isfinite(mu + sigma + seed)):
            raise BadInput(
                f"--lognormal {args.lognormal}: no number of these may be infinite, SIGMA, SEED and"
                " --length must not be negative."
            )
        cu_seqlens = log_normal_documents(mu, sigma, int(seed), args.length)
    report = context.check(
        cu_seqlens,
        block_size=args.block_size,
        block_grid=args.block_grid,
        cp=args.cp,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
    )
    figures = asdict(report)
    for name, value in figures.items():
        print(f"{name:<20} {value:.4f}" if isinstance(value, float) else f"{name:<20} {value}")
    write_json(args.json, figures)
    return 0


def _numbers(option: str, text: str, kind: type, count: int | None = None) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(f"{option} {text}: give numbers with commas between them.") from None
    if count is not None and len(numbers) != count:
        raise BadInput(f"{option} {text}: give {count} numbers.")
    return numbers


def _layouts(args: argparse.Namespace) -> int:
    from llada_megatron.verify import layouts
    from llada_megatron.verify.comparison import TOLERANCES

    report = layouts.check(args.names or list(layouts.MATRIX))
    _print_layouts(report, TOLERANCES)
    write_json(args.json, report.as_json())
    return 0 if report.passed else 1


def _print_layouts(report: LayoutReport, tolerances: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("layout", ""):
        table.add_column(name, no_wrap=True)
    for name in ("n", *(name.replace("grad_norm", "grad").replace("expert_", "") for name in tolerances)):
        table.add_column(name, justify="right", no_wrap=True)
    for result in report.results:
        figures = [
            f"{result.differences[name]:.0e}" if result.differences[name] else "0" for name in tolerances
        ]
        verdict = "ok" if result.passed else "FAILED"
        table.add_row(result.name, verdict, str(result.processes), *figures)
    table.add_row("tolerance", "", "", *(f"{value:.0e}" if value else "0" for value in tolerances.values()))
    console = Console(highlight=False)
    console.print(table)
    failed = sum(not result.passed for result in report.results)
    console.print("\nn processes; relative differences, tokens routed otherwise, and the expert bias.")
    console.print(f"Smallest routing margin of the reference: {report.routing_margin:.1e}")
    outcome = (
        f"{failed} of {len(report.results)} layouts differ."
        if failed
        else "Every layout trains the same model."
    )
    console.print(outcome, style="bold")


def _golden(args: argparse.Namespace) -> int:
    from llada_megatron.config.schema import LayoutConfig
    from llada_megatron.parallel import groups
    from llada_megatron.verify import golden

    groups.initialize(LayoutConfig())
    try:
        report = golden.check(args.directory, args.model, Core(args.core))
    finally:
        groups.destroy()
    _print(report, golden.TOLERANCES)
    write_json(args.json, _as_json(report, golden.TOLERANCES))
    return 0 if report.passed else 1


def _as_json(report: GoldenReport, tolerances: dict[str, float]) -> dict[str, object]:
    return {
        "cases": [
            {"name": case.name, "differences": case.differences, "passed": case.passed}
            for case in report.cases
        ],
        "worst": report.worst(),
        "tolerances": tolerances,
        "derived": report.derived,
        "not_served": report.not_served,
        "unknown": report.unknown,
        "passed": report.passed,
    }


def _print(report: GoldenReport, tolerances: dict[str, float]) -> None:
    """One line per case: how far it came to its tolerance, and which quantity came closest."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("case", "", "worst"):
        table.add_column(name, no_wrap=True)
    for name in ("difference", "allowed"):
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
    if report.derived:
        console.print("\nNo numbers of public code:", ", ".join(report.derived))
    if report.not_served:
        console.print("\nNot served yet, not counted:", ", ".join(report.not_served))
    if report.unknown:
        console.print("\nNot known, not read:", ", ".join(report.unknown))
    failed = sum(not case.passed for case in report.cases)
    outcome = (
        f"{failed} of {len(report.cases)} cases failed."
        if failed
        else f"All {len(report.cases)} cases agree."
        if report.cases
        else "No case is served."
    )
    console.print(f"\n{outcome}", style="bold")


def _closest(case: CaseResult, tolerances: dict[str, float]) -> str:
    """The quantity with the largest difference relative to its tolerance; exact ones agree here."""
    return max(
        case.differences,
        key=lambda name: case.differences[name] / tolerances[name] if tolerances[name] else 0,
    )
