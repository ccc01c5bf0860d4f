"""`llada bench`: measurements on this machine."""

from __future__ import annotations

import argparse

EXAMPLE = "llada bench step --json step.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    step = benches.add_parser("step", help="seconds and memory per training step: AR, MDLM, BDLM")
    step.add_argument("--rounds", type=int, default=8, help="interleaved rounds per case (default 8)")
    step.add_argument("--json", metavar="FILE", help="write the figures")
    step.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="hydra overrides of experiment=bench")


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark; 0 when its bounds hold, 1 when one does not."""
    from llada_megatron.bench import step

    return step.run(args.overrides, rounds=args.rounds, json_file=args.json)
