"""The verb `llada plan`: memory, time and traffic of a layout, or the best layouts of a cluster."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.config import compose, rules
from llada_megatron.config.errors import BadInput
from llada_megatron.config.flops import DocumentLengths
from llada_megatron.config.parameters import active_parameters, total_parameters
from llada_megatron.record.json_files import write_json

if TYPE_CHECKING:
    from llada_megatron.plan.planner import Planner

EXAMPLE = "llada plan experiment=llada2_flash_cpt cluster=h100_512"
TOP = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "--search", action="store_true", help="rank every legal layout instead of planning the configured one"
    )
    parser.add_argument("--top", type=int, metavar="N", help=f"layouts that --search lists; default {TOP}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw where memory and time go")
    parser.add_argument(
        "--expert-imbalance",
        type=float,
        metavar="X",
        help="tokens at the busiest process's experts over the mean; default 1.2",
    )
    parser.add_argument(
        "--document-tokens",
        metavar="MEDIAN,SIGMA",
        help="log-normal lengths of packed documents; default one document per sequence",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="dry-run training's step on one rank of each pipeline stage, in minutes",
    )
    parser.add_argument(
        "--ranks", metavar="R,R", help="global ranks for --exact instead of the first of each pipeline stage"
    )
    parser.add_argument(
        "--stage", metavar="NAME", help="of the schedule, for --exact; default the one that needs most memory"
    )
    parser.add_argument(
        "--all-coordinates",
        action="store_true",
        help="with --exact: build the model of every place in the grid and count its parameters",
    )
    _add_decoding(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="hydra overrides, experiment=NAME first"
    )


DECODING = ("batch", "context", "branches", "buffer", "tokens_per_forward", "tp", "bp")
"""Options that belong to --decode."""


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--decode",
        action="store_true",
        help="how long a forward of decoding takes, by tensor and branch parallelism and batch",
    )
    group.add_argument("--batch", metavar="N,N", help="sequences of a replica; default 1,8,32")
    group.add_argument(
        "--context", type=int, metavar="N", help="tokens of a sequence; default data.sequence_length"
    )
    group.add_argument(
        "--branches", type=int, metavar="K", help="lookahead branches beside the anchor; default 0"
    )
    group.add_argument("--buffer", type=int, metavar="N", help="active blocks of a sequence; default 1")
    group.add_argument(
        "--tokens-per-forward",
        type=float,
        metavar="X",
        help="that a sequence gains by a forward, as `llada bench decode` measures them; default 1",
    )
    group.add_argument("--tp", metavar="N,N", help="layout.tp; default those of 1, 2, 4, 8 that are legal")
    group.add_argument("--bp", metavar="N,N", help="layout.bp; default the divisors of branches + 1")


def run(args: argparse.Namespace) -> int:
    """Plan or plan decoding (0 when it, or some of it, fits, 1 when not) or search (1 when nothing fits).

    Raises BadInput for bad input.
    """
    if args.decode and (args.search or args.exact or args.plot or args.document_tokens):
        raise BadInput(
            "--decode plans forwards of decoding: leave out --search, --exact, --plot and --document-tokens."
        )
    if not args.decode and any(getattr(args, name) is not None for name in DECODING):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in DECODING)
        raise BadInput(f"{options} belong to --decode: add it.")
    if args.search and args.plot:
        raise BadInput("--plot draws one layout: leave out --search.")
    if args.top is not None and (not args.search or args.top < 1):
        raise BadInput("--top N lists the N fastest of --search: give at least 1, and --search.")
    if args.exact and args.search:
        raise BadInput("--exact dry-runs one layout: leave out --search.")
    if args.all_coordinates and args.plot:
        raise BadInput("--all-coordinates counts parameters and runs no step: leave out --plot.")
    if (args.stage or args.ranks or args.all_coordinates) and not args.exact:
        raise BadInput("--stage, --ranks and --all-coordinates belong to --exact: add it.")
    if args.ranks and args.all_coordinates:
        raise BadInput("--all-coordinates takes its own ranks: leave out --ranks.")
    config = compose.compose(args.overrides)
    if args.exact and (args.document_tokens or (args.expert_imbalance or 1.0) > 1):
        raise BadInput(
            "--exact runs balanced experts and sequences of one document: leave out --expert-imbalance and"
            " --document-tokens."
        )
    if args.exact:
        return _exact(args, config)
    if args.decode:
        return _decode(args, config)
    return _search(args, config) if args.search else _plan(args, config)


def _planner(args: argparse.Namespace, config: compose.Config) -> Planner:
    from llada_megatron.plan.planner import EXPERT_IMBALANCE, Planner

    imbalance = EXPERT_IMBALANCE if args.expert_imbalance is None else args.expert_imbalance
    documents = DocumentLengths.parse(args.document_tokens) if args.document_tokens else None
    return Planner(config, expert_imbalance=imbalance, documents=documents)


def _plan(args: argparse.Namespace, config: compose.Config) -> int:
    from llada_megatron.plan import report
    from llada_megatron.plan.estimate import plan
    from llada_megatron.plan.topology import check_processes

    schedule = rules.check(config)
    planner = _planner(args, config)
    check_processes(config)
    result = plan(planner, config.layout, schedule)
    model = config.model
    counted = {"total": total_parameters(model), "active": active_parameters(model)}
    write_json(args.json, {"parameters": counted} | asdict(result) | _summary(result))
    if args.plot:
        from llada_megatron.plan.plots import draw

        draw(result, args.plot)
    report.print_plan(result, config)
    return 0 if result.fits else 1


def _exact(args: argparse.Namespace, config: compose.Config) -> int:
    from llada_megatron.dryrun.child import dry_run
    from llada_megatron.plan import exact, exact_report
    from llada_megatron.plan.estimate import plan
    from llada_megatron.plan.planner import Planner
    from llada_megatron.plan.topology import check_processes

    exact.check(config)
    without = exact.replaced(config)
    config = exact.dry_configuration(config)
    schedule = rules.check(config)
    planner = Planner(config, expert_imbalance=1.0)
    check_processes(config)
    stages = {stage.name: stage for stage in schedule.stages}
    name = args.stage or plan(planner, config.layout, schedule).fullest.stage
    if name not in stages:
        raise BadInput(f"--stage {name} is not in schedule.stages: choose from {', '.join(stages)}.")
    stage, layout = stages[name], config.layout
    micro_batches = exact.dry_micro_batches(config, stage)
    if args.ranks:
        ranks = exact.chosen_ranks(args.ranks, layout)
    else:
        ranks = (exact.one_rank_per_shard if args.all_coordinates else exact.one_rank_per_stage)(layout)
    reports = exact_report.with_progress(
        dry_run(config, stage, ranks, micro_batches, count_only=args.all_coordinates), len(ranks)
    )
    if args.all_coordinates:
        counted, expected = exact.counted_parameters(config, reports)
        write_json(args.json, {"parameters": counted, "expected": expected, "ranks": reports})
        exact_report.print_count(config, counted, expected, len(ranks))
        return 0 if counted == expected else 1
    placement = planner.place(layout)
    found = [exact.compare(planner, placement, stage, report, micro_batches) for report in reports]
    write_json(args.json, exact_report.figures(planner, stage, micro_batches, found))
    if args.plot:
        from llada_megatron.plan.plots import draw_exact

        draw_exact(planner, found, args.plot)
    exact_report.print_exact(planner, stage, micro_batches, found, without=without)
    return 0 if max(one.report["peak"] for one in found) <= planner.usable_bytes else 1


def _decode(args: argparse.Namespace, config: compose.Config) -> int:
    from llada_megatron.plan import decoding_report
    from llada_megatron.plan.decoding_speed import BATCHES, Workload, check_workload, plan_decoding

    if config.layout.bp > 1:
        raise BadInput(f"--decode compares layouts: give --bp {config.layout.bp} in the place of layout.bp.")
    stage = rules.check(config).stages[-1]
    workload = Workload(
        block_size=stage.block_size,
        context=stage.sequence_length if args.context is None else args.context,
        branches=args.branches or 0,
        buffer=1 if args.buffer is None else args.buffer,
        tokens_per_forward=1.0 if args.tokens_per_forward is None else args.tokens_per_forward,
    )
    batches = _whole_numbers("--batch", args.batch) or BATCHES
    check_workload(stage, workload)
    planner = _planner(args, config)
    forwards = plan_decoding(
        planner,
        workload,
        batches=batches,
        tps=_whole_numbers("--tp", args.tp),
        bps=_whole_numbers("--bp", args.bp),
    )
    write_json(args.json, decoding_report.figures(planner, workload, forwards))
    decoding_report.print_decoding(planner, workload, forwards)
    return 0 if any(each.fits for each in forwards) else 1


def _whole_numbers(option: str, text: str | None) -> list[int]:
    """From `N,N`, each at least 1; none where the option is not given."""
    words = [] if text is None else text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise BadInput(
            f"{option} {text}: give whole numbers of at least 1 with commas between them, such as"
            f" {option} 1,2."
        )
    return [int(word) for word in words]


def _summary(result: Any) -> dict[str, Any]:
    names = ("fits", "hours", "tokens_per_sec", "mfu", "cost")
    return {name: getattr(result, name) for name in names} | {"fullest_stage": result.fullest.rank}


def _search(args: argparse.Namespace, config: compose.Config) -> int:
    from llada_megatron.plan import report
    from llada_megatron.plan.search import Search

    result = Search(_planner(args, config)).run()
    write_json(args.json, asdict(result))
    report.print_search(result, top=args.top or TOP)
    return 0 if result.candidates else 1
