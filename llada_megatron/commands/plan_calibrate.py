"""`llada plan calibrate`: a cluster's achievable shares, fitted to steps that were measured on it."""

from __future__ import annotations

import argparse
from pathlib import Path

from llada_megatron.config import compose
from llada_megatron.plan.calibrate import fit, print_shares, print_steps, read, write_cluster

EXAMPLE = "llada plan calibrate step_1.json step_8.json attention.json cluster=h100 --out my_site.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "words",
        nargs="+",
        metavar="FILE.json | KEY=VALUE",
        help="of `llada bench step --json` and `bench attention --out`; hydra overrides, cluster=NAME first",
    )
    parser.add_argument(
        "--hold-out",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE.json",
        help="steps that are planned and compared, not fitted",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="NAME.yaml",
        help="write the cluster; in configs/cluster it is cluster=NAME",
    )


def run(args: argparse.Namespace) -> int:
    """Fit and print: 0; raises BadInput for files that hold no benchmark."""
    overrides = [word for word in args.words if "=" in word]
    files = [Path(word) for word in args.words if "=" not in word]
    described = compose.compose(["experiment=bench", *overrides]).cluster
    found, held_out = read(files), read(args.hold_out).steps
    fitted = fit(found, described)
    if args.out:
        write_cluster(args.out, found, files, described, fitted)
    print_steps(found.steps, held_out, described, fitted)
    print_shares(found, described, fitted)
    if args.out:
        print(f"\n{args.out} is written.")
    return 0
