"""`llada evaluate`: what a checkpoint's weights are worth on held-out text, in any layout."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.config.errors import BadInput
from llada_megatron.record.json_files import write_json

if TYPE_CHECKING:
    from llada_megatron.config.schema import Config

EXAMPLE = "llada evaluate runs/demo --block-sizes 1,4,32,full"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = (
        "The likelihood bound of prepared text at several block sizes, and the exact NLL of an autoregressive"
        " model. Scores on tasks are `llada eval`."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run: its newest")
    parser.add_argument(
        "--block-sizes",
        metavar="B,B",
        help="of the bound, `full` for L; default: as the run evaluated itself",
    )
    parser.add_argument(
        "--ar",
        action=argparse.BooleanOptionalAction,
        help="the exact next-token NLL; default: of an AR model",
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="PREFIX",
        help="prepared text, all of it held out; once for each; default: the run's own",
    )
    parser.add_argument("--sequences", type=int, metavar="N", help="held-out sequences")
    parser.add_argument("--draws", type=int, metavar="N", help="masks per sequence")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings, such as layout.tp=2 precision.dtype=fp32"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate and print: 0; BadInput for a checkpoint, text or layout that do not fit."""
    from llada_megatron.config import compose
    from llada_megatron.config.families import formulas_of, require_masks
    from llada_megatron.config.objectives import OBJECTIVES
    from llada_megatron.record.manifest import find

    checkpoint = find(args.checkpoint)
    manifest = checkpoint.manifest
    config = compose.elsewhere(manifest.config_of_weights, _settings(args) + args.overrides)
    stages = {stage.name: stage.objective for stage in config.schedule.stages}
    is_causal = OBJECTIVES[stages[manifest.stage]].causal if manifest.stage in stages else True
    with_ar = is_causal if args.ar is None else args.ar
    if not formulas_of(config.model).FILLS_MASKS:
        if args.block_sizes is not None:
            require_masks(config.model, "The bound of --block-sizes")
        config = replace(config, evaluation=replace(config.evaluation, block_sizes=[]))
    _check(config, with_ar)
    found = evaluate(config, checkpoint.path, autoregressive=with_ar)
    record = {"checkpoint": str(checkpoint.path), "step": manifest.step, "data": config.data.path, **found}
    write_json(args.json, record)
    _print(record)
    return 0


def evaluate(config: Config, checkpoint: Path, *, autoregressive: bool) -> dict[str, Any]:
    """Figures of a checkpoint, from as many processes of this machine as the layout asks for."""
    from llada_megatron.runtime.launch import launch

    return launch(
        _on_this_rank,
        config,
        checkpoint,
        autoregressive,
        processes=config.layout.processes,
        preload="llada_megatron.evaluate.likelihood",
    )[0]


def _on_this_rank(config: Config, checkpoint: Path, autoregressive: bool) -> dict[str, Any]:
    from llada_megatron.evaluate.likelihood import evaluate_checkpoint

    return evaluate_checkpoint(config, checkpoint, autoregressive=autoregressive)


def _settings(args: argparse.Namespace) -> list[str]:
    """The options as settings."""
    given = []
    if args.block_sizes is not None:
        given.append(f"evaluation.block_sizes=[{args.block_sizes}]")
    if args.data is not None:
        given += [f"data.path={json.dumps(args.data)}", "data.weights=[]", "data.split=0,1"]
        given.append("data.validation=[]")
    for name in ("sequences", "draws"):
        if (value := getattr(args, name)) is not None:
            if value < 1:
                raise BadInput(f"--{name} {value}: give at least 1.")
            given.append(f"evaluation.{name}={value}")
    return given


def _check(config: Config, with_ar: bool) -> None:
    from llada_megatron.config.layout_rules import check_layout
    from llada_megatron.config.rules import check_words
    from llada_megatron.config.schedule import block_size_of

    check_layout(config)
    if not (config.evaluation.block_sizes or with_ar):
        raise BadInput("There is nothing to evaluate: give --block-sizes, --ar or both.")
    for size in config.evaluation.block_sizes:
        block_size_of(size, config.data.sequence_length, "--block-sizes")
    if config.evaluation.planted_share:
        check_words(config)


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    def row(name: str, estimate: dict[str, Any], mean: str) -> None:
        cells = (estimate[key] for key in (mean, "se", "bits_per_byte"))
        table.add_row(name, *("-" if cell is None else f"{cell:.4f}" for cell in cells))
        for domain, own in estimate.get("domains", {}).items():
            row(f"  {domain}", own, "mean")

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("nats/token", "std. error", "bits/byte"):
        table.add_column(name, justify="right")
    planted = Table("wrong tokens planted", "% of tokens", "std. error", box=None, pad_edge=False)
    if record["ar"]:
        row("AR, exact", record["ar"], "nll")
    for size, bound in record["bound"].items():
        row(f"bound, block {size}", bound, "mean")
    for size, shares in record["planted"].items():
        for name, share in shares.items():
            cells = (f"{100 * share[key]:.2f}" if share[key] is not None else "-" for key in ("mean", "se"))
            planted.add_row(f"{name}, block {size}", *cells)
    for name, entropy in record["baselines"].items():
        table.add_row(f"{name} entropy of the text", f"{entropy:.4f}", "", "", style="dim")
    console = Console(highlight=False)
    console.print(
        f"{record['checkpoint']} on {record['sequences']} held-out sequences of {', '.join(record['data'])}",
        soft_wrap=True,
    )
    console.print(table)
    if record["planted"]:
        console.print(planted)
