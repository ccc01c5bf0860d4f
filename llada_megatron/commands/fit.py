"""`llada fit`: a scaling law fitted to runs, what it says of others, and the sizes that a budget buys."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from llada_megatron.config.errors import BadInput
from llada_megatron.record.json_files import write_json
from llada_megatron.scaling import budget, points, report
from llada_megatron.scaling.fit import fit
from llada_megatron.scaling.laws import CHINCHILLA, Array, Law
from llada_megatron.scaling.points import Counting, Point

EXAMPLE = "llada fit runs/ladder/* --hold-out runs/larger --plot law.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "runs", type=Path, nargs="*", metavar="RUN", help="directories of runs that have ended"
    )
    parser.add_argument(
        "--hold-out", type=Path, nargs="+", default=[], metavar="RUN", help="runs to predict, not fitted"
    )
    parser.add_argument(
        "--points",
        type=Path,
        metavar="FILE",
        help='instead of runs: lines of {"N", "D", "loss"}, or with "R" and "P" for the law of DLCM;'
        ' "held_out": true to predict',
    )
    parser.add_argument(
        "--loss",
        default="",
        metavar="KIND",
        help="ar, or bound:SIZE; default: what the first run was trained to",
    )
    parser.add_argument(
        "--parameters",
        choices=("total", "active"),
        default="total",
        help="of a MoE what N counts (default total)",
    )
    parser.add_argument(
        "--without-embedding", action="store_true", help="N without the embedding and the head"
    )
    parser.add_argument(
        "--budget",
        type=float,
        nargs="+",
        default=[],
        metavar="FLOPS",
        help="what each buys (default: 1, 10 and 100 times the largest run's)",
    )
    parser.add_argument(
        "--shape",
        type=float,
        nargs=2,
        default=[],
        metavar=("R", "P"),
        help="of DLCM, what budgets are spent at: tokens per concept and the backbone's share of the"
        " parameters (default: the costliest run's)",
    )
    parser.add_argument(
        "--bootstrap", type=int, default=500, metavar="N", help="draws of the points (default 500)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the law")


def run(args: argparse.Namespace) -> int:
    """Fit, print and write: 0. Raises BadInput for points that determine no law or must not be compared."""
    if bool(args.runs) == (args.points is not None):
        raise BadInput("Give the directories of runs, or a file with --points, and not both.")
    if any(not 0 < flops < float("inf") for flops in args.budget):
        raise BadInput("--budget is a number of FLOPs above 0, for example 1e21.")
    if args.shape and not (args.shape[0] > 1 and 0 < args.shape[1] < 1):
        raise BadInput(
            "--shape is R and P: tokens per concept above 1 and a share between 0 and 1, as 4 0.6."
        )
    found = findings(args)
    write_json(args.json, report.content(found))
    report.print_findings(found)
    if args.plot:
        from llada_megatron.scaling.plots import draw

        draw(found, args.plot)
        print(f"\n{args.plot} is written.")
    return 0


def findings(args: argparse.Namespace) -> report.Findings:
    """The fit and all that is shown of it."""
    law, loss, counted, fitted, held_out = _points(args)
    if law is CHINCHILLA and args.shape:
        raise BadInput("--shape is of DLCM, and these points have no R and P: leave it out.")
    found = fit(law, points.columns_of(law, fitted), _losses(fitted), draws=args.bootstrap)
    predicted, doubts = report.predictions(found, held_out), report.doubts(found)
    remarks = points.remarks_on([*fitted, *held_out]) if args.runs else []
    remarks += [*report.misses(predicted), *doubts.values()]
    if doubts:
        remarks.append(report.ADD_RUNS.format(variables=", ".join(law.variables)))
    cost, optima, shape = None, [], _shape(law, args.shape, fitted)
    if doubts.keys() & set(law.exponents):
        remarks.append("So there is no table of what budgets buy.")
    else:
        cost = budget.TokenFlops.of(fitted).at(shape)
        optima = budget.optima(found, fitted, args.budget or budget.default_budgets(fitted), cost, shape)
        remarks += report.budget_doubts(optima)
    return report.Findings(found, fitted, loss, counted, predicted, optima, shape, cost, remarks)


def _shape(law: Law, given: list[float], fitted: list[Point]) -> dict[str, float]:
    """R and P that budgets are spent at; of L(N, D) nothing."""
    costliest = max(fitted, key=lambda point: point.flops).variables
    names = [name for name in law.variables if name not in ("N", "D")]
    return dict(zip(names, given or [costliest[name] for name in names], strict=True))


def _points(args: argparse.Namespace) -> tuple[Law, str, str, list[Point], list[Point]]:
    """The law, the names of its loss and of N, and the points to fit and to predict."""
    if args.points is not None:
        if args.hold_out or args.loss or args.without_embedding or args.parameters != "total":
            raise BadInput(
                "--hold-out, --loss, --parameters and --without-embedding are of runs: a file says what its"
                ' points are, and "held_out": true which of them to predict.'
            )
        law, fitted, held_out = points.read_points(args.points)
        return law, "of the file", "as the file has it", fitted, held_out
    counting = Counting(args.parameters == "active", not args.without_embedding)
    runs = [run for run in args.runs if run not in args.hold_out]
    law, loss, read = points.read_runs([*runs, *args.hold_out], args.loss, counting)
    return law, loss, str(counting), read[: len(runs)], read[len(runs) :]


def _losses(fitted: list[Point]) -> Array:
    return np.array([point.loss for point in fitted])
