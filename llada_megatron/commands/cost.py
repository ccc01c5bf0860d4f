"""`llada cost`: where the time of a run went, attempt by attempt, and what it cost."""

from __future__ import annotations

import argparse
from pathlib import Path

from llada_megatron.config.compose import load
from llada_megatron.config.errors import BadInput
from llada_megatron.jobs.account import account
from llada_megatron.jobs.cost_report import markdown
from llada_megatron.record import events
from llada_megatron.record.run_dir import RunDir

EXAMPLE = "llada cost runs/llada2_flash --price 2.5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument(
        "--price", type=float, metavar="P", help="per device and hour; default: the cluster's"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw where the time went")


def run(args: argparse.Namespace) -> int:
    """Print the account of a run: 0; BadInput for a run without a record."""
    record = events.read(args.run)
    if not any(event["event"] == "started" for event in record):
        raise BadInput(f"{args.run} has no record of attempts: it was neither submitted nor supervised.")
    config = load(RunDir(args.run).config)
    result = account(args.run, record)
    price = config.cluster.price_per_gpu_hour if args.price is None else args.price
    text = markdown(result, price)
    print(text, end="")
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    if args.plot:
        from llada_megatron.observe.cost_plot import draw

        draw(result, args.plot)
    return 0
