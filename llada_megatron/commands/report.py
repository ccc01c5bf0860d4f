"""`llada report RUN`: writes the report of a run and prints its main table; --serve shows it in a browser.

With --compare it sets the results of `llada eval` side by side instead.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from llada_megatron.config.errors import BadInput
from llada_megatron.config.quantities import short_count
from llada_megatron.observe import server
from llada_megatron.observe.compared_runs import write_comparison
from llada_megatron.observe.parts import NOT_YET
from llada_megatron.observe.report import write_report
from llada_megatron.observe.report_training import missing
from llada_megatron.record.json_files import read_json, write_json
from llada_megatron.record.run_dir import PAGE, RunDir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `llada report`."""
    parser.add_argument(
        "run", type=Path, nargs="?", metavar="RUN", help="directory of a run, finished or not"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="results of `llada eval`, folders of them, or runs: models or rules side by side",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the comparison's page (default comparison)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also copy the page's figures to FILE")
    parser.add_argument(
        "--serve",
        action="store_true",
        help="show the page to browsers of this machine, up to date while the run goes on, until Ctrl-C",
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help=f"of --serve, 0 for a free one; default {server.PORT}"
    )


def run(args: argparse.Namespace) -> int:
    """Write the report and print its main table, or serve it, or compare.

    Raises BadInput where RUN holds no run or no step yet, for files that hold no results, and for a port that
    cannot be had.
    """
    if (args.run is None) == (args.compare is None):
        raise BadInput("Give the directory of a run, or files of results with --compare, and not both.")
    if args.serve and (args.compare is not None or args.json is not None):
        raise BadInput("--serve shows the page of a run: leave out --compare and --json.")
    if args.port is not None and not args.serve:
        raise BadInput("--port belongs to --serve: add it.")
    if args.compare is not None:
        return compare(args.compare, args.out or Path("comparison"), args.json)
    if args.out is not None:
        raise BadInput("--out is for --compare: a run's report lies in its directory, remove --out.")
    if args.serve:
        return serve(args.run, server.PORT if args.port is None else args.port)
    write_report(args.run)
    print_summary(args.run)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(RunDir(args.run).report_json, args.json)
    return 0


def serve(run_dir: Path, port: int) -> int:
    """Serve a run's report until Ctrl-C, which leaves as KeyboardInterrupt."""
    with server.Server(server.LiveReport(run_dir), port) as serving:
        print(f"{serving.url} shows {run_dir}; Ctrl-C ends it", flush=True)
        serving.serve_forever()
    return 0


def compare(paths: list[Path], folder: Path, copy: Path | None) -> int:
    """Write the page of a comparison and print its scores; raises BadInput for what is no file of results."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    content = write_comparison(paths, folder)
    write_json(copy, content)
    console = Console(highlight=False)
    of: dict[str, Table] = {}
    for score in content["scores"]:
        name = f"{score['model']}  {score['decoding'] or 'likelihoods'}"
        if name not in of:
            of[name] = Table(box=None, pad_edge=False)
            for column in ("task", "metric"):
                of[name].add_column(column, overflow="fold")
            for column in ("score", "std. error", "tokens/forward"):
                of[name].add_column(column, justify="right", no_wrap=True)
        speed = score["cost"].get("tokens_per_forward")
        of[name].add_row(
            Text(score["task"]),
            Text(score["metric"]),
            f"{score['value']:.4f}",
            "-" if score["error"] is None else f"{score['error']:.4f}",
            "-" if speed is None else f"{speed:.2f}",
        )
    for name, table in of.items():
        console.print(name, style="bold", markup=False, soft_wrap=True)
        console.print(table)
    for line in content["frontiers"]:
        console.print(
            f"AUP {line['aup']:.1f}: {line['model']}, {line['rule']}, {line['task']} ({line['metric']})",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"\nComparison: {folder / PAGE}", markup=False, soft_wrap=True)
    return 0


def print_summary(run_dir: Path) -> None:
    """Print the stages with their bounds from report.json, the references, and where the report is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    files = RunDir(run_dir)
    report = read_json(files.report_json, f"call `llada report {run_dir}` again")
    sizes = sorted({size for stage in report["stages"] for size in stage["bound"]}, key=int)
    table = Table(box=None, pad_edge=False)
    table.add_column("stage", overflow="ellipsis", no_wrap=True)
    for name in ("block", "tokens", "loss", *(f"@{size}" for size in sizes)):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in report["stages"]:
        numbers = [
            str(stage["block_size"]),
            short_count(stage["tokens"]),
            _decimal(stage["train_loss"], missing(stage)),
            *(_decimal(stage["bound"].get(size, {}).get("mean"), "-") for size in sizes),
        ]
        table.add_row(Text(stage["name"]), *numbers)

    references = Table(box=None, show_header=False, pad_edge=False)
    references.add_column()
    references.add_column(justify="right")
    references.add_column(style="dim")
    ar, baselines = report["ar"], report["baselines"] or {}
    trained = f" after {short_count(ar['tokens'])} tokens" if ar and ar["tokens"] else ""
    references.add_row("AR NLL", _decimal(ar and ar["nll"]), f"autoregressive model{trained}" if ar else "")
    references.add_row("bigram", _decimal(baselines.get("bigram")), "entropy of a token given the one before")
    references.add_row("unigram", _decimal(baselines.get("unigram")), "entropy of a token")

    console = Console()
    bounds = ", and bound on held-out text @ block size" if sizes else ""
    console.print(f"Training loss{bounds}, in nats per token", style="bold")
    console.print(table, "", references, sep="\n")
    errors = [
        bound["se"]
        for stage in report["stages"]
        for bound in stage["bound"].values()
        if bound["se"] is not None
    ]
    if errors:
        console.print(f"\nStandard errors of the bounds are at most {max(errors):.4f}.", highlight=False)
    console.print(f"\nReport: {files.report_page}", markup=False, highlight=False, soft_wrap=True)


def _decimal(value: float | None, absent: str = NOT_YET) -> str:
    return absent if value is None else f"{value:.3f}"
