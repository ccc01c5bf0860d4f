"""The verb `llada checkpoint`: what a run has saved, whether it is whole, means and differences."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llada_megatron.config.errors import BadInput
from llada_megatron.record import carried
from llada_megatron.record.manifest import Checkpoint, Manifest, file_damage, find, readable
from llada_megatron.record.run_dir import SHARDS, RunDir

EXAMPLE = "llada checkpoint list runs/demo"
DIFFERENCES_SHOWN = 12
UNSQUEEZED = 1000
"""Columns that rich may use: a terminal that is too narrow wraps lines, which loses nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `llada checkpoint`."""
    from llada_megatron.config.schema import CheckpointConfig

    metric = CheckpointConfig.best_metric
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="the checkpoints of a run")
    listing.add_argument("run", type=Path, metavar="RUN", help="a run's directory")
    verify = commands.add_parser("verify", help="read every file and compare it with the manifest")
    verify.add_argument("path", metavar="PATH", help="a checkpoint, or a run: its newest")
    merge = commands.add_parser("merge", help="the mean of a run's best checkpoints, in fp32, evaluated")
    merge.add_argument("run", type=Path, metavar="RUN", help="a run's directory")
    merge.add_argument("--top-k", type=int, required=True, metavar="K")
    merge.add_argument("--metric", default=metric, metavar="NAME", help=f"default {metric}")
    merge.add_argument("--weights", metavar="W,W,...", help="of the best first; default: equal")
    merge.add_argument("--to", type=Path, metavar="DIR", help="default RUN/merged/top_K_METRIC")
    merge.add_argument(
        "--layout", nargs="+", default=[], metavar="KEY=VALUE", help="of the evaluation; default one process"
    )
    merge.add_argument("--no-evaluation", action="store_true")
    fetch = commands.add_parser(
        "fetch", help="bring a checkpoint back from where checkpoint.copy_to copied it"
    )
    fetch.add_argument("url", metavar="URL")
    fetch.add_argument("run", type=Path, metavar="RUN", help="a run's directory, which may be new")
    fetch.add_argument("--step", type=int, metavar="N", help="default: the newest")
    average = commands.add_parser("average", help="a checkpoint of the moving average of the weights")
    average.add_argument("path", metavar="PATH", help="a checkpoint, or a run: its newest")
    average.add_argument("--to", type=Path, metavar="DIR", help="default RUN/merged/average_STEP")
    diff = commands.add_parser("diff", help="how two checkpoints differ, in configuration and weights")
    diff.add_argument("a", metavar="A")
    diff.add_argument("b", metavar="B")


def run(args: argparse.Namespace) -> int:
    """Run a command: 0, or 1 where `verify` finds damage and `diff` a difference."""
    commands = {
        "list": _list,
        "verify": _verify,
        "merge": _merge,
        "average": _average,
        "fetch": _fetch,
        "diff": _diff,
    }
    return commands[args.command](args)


def _list(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    paths = RunDir(args.run).whole_checkpoints()
    if not paths:
        raise BadInput(f"{args.run} has no checkpoints: give the directory of a run.")
    manifests = {each.path: each.manifest for each in readable(args.run)}
    metrics = sorted({name for manifest in manifests.values() for name in manifest.metrics})
    table = Table(box=None, pad_edge=False)
    for name in ("checkpoint", "stage"):
        table.add_column(name)
    for name in ("block", "tokens", "size", *metrics):
        table.add_column(name, justify="right")
    for path in paths:
        manifest = manifests.get(path)
        if manifest is None:
            table.add_row(path.name, "(manifest is damaged)")
            continue
        size = sum(record["bytes"] for record in manifest.files.values())
        table.add_row(
            path.name,
            f"{manifest.stage}{' (end)' if manifest.stage_ended else ''}",
            str(manifest.block_size),
            f"{manifest.consumed_tokens:,}",
            f"{size / 1e6:,.1f} MB",
            *(f"{manifest.metrics[name]:.4f}" if name in manifest.metrics else "-" for name in metrics),
        )
    console = Console(highlight=False, width=UNSQUEEZED)
    console.print(table)
    for damaged in RunDir(args.run).damaged_checkpoints():
        console.print(f"{damaged.name} was found damaged and set aside")
    return 0


def _verify(args: argparse.Namespace) -> int:
    checkpoint = find(args.path)
    manifest = checkpoint.manifest
    damage = file_damage(checkpoint, sorted(manifest.files))
    for phrase in damage:
        print(phrase)
    size = sum(record["bytes"] for record in manifest.files.values())
    verdict = "is damaged" if damage else "is whole"
    print(f"{checkpoint.path} {verdict}: {len(manifest.files)} files, {size:,} bytes, step {manifest.step}")
    return 1 if damage else 0


def _fetch(args: argparse.Namespace) -> int:
    from llada_megatron.checkpoint.copies import Place, fetch

    place = Place(args.url)
    found = {each.manifest.step: each for each in place.checkpoints()}
    if not found:
        raise BadInput(f"{args.url} has no checkpoints: give what a run's checkpoint.copy_to was.")
    step = max(found) if args.step is None else args.step
    if step not in found:
        raise BadInput(f"{args.url} has no step {step}: it has step {' and '.join(map(str, sorted(found)))}.")
    final = RunDir(args.run).checkpoints / found[step].path
    fetch(place, found[step], final)
    print(f"{final}: {len(found[step].manifest.files)} files; `llada checkpoint verify {final}` reads them")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from llada_megatron.checkpoint import merge, publish
    from llada_megatron.checkpoint.retention import best

    if args.top_k < 1:
        raise BadInput(f"--top-k {args.top_k}: give the number of checkpoints to merge.")
    checkpoints = readable(args.run)
    chosen = best(checkpoints, args.metric, args.top_k)
    if len(chosen) < args.top_k:
        known = sorted({name for each in checkpoints for name in each.manifest.metrics})
        raise BadInput(
            f"{len(chosen)} checkpoints of {args.run} have {args.metric}, not {args.top_k}; metrics there:"
            f" {', '.join(known) or 'none, set evaluation.block_sizes'}. Keep more with checkpoint.keep_best."
        )
    weights = _weights(args.weights, len(chosen))
    target = args.to or RunDir(args.run).merged / f"top_{args.top_k}_{args.metric}"
    aside = publish.begin(target)
    merge.write_mean([each.path for each in chosen], weights, aside / SHARDS)
    last = max(chosen, key=lambda each: each.manifest.step)
    newest = last.manifest
    carried.write(carried.content_of(last), aside)
    lineage = {
        "kind": "merge",
        "metric": args.metric,
        "sources": [
            {
                "path": str(each.path),
                "step": each.manifest.step,
                "weight": weight,
                args.metric: each.manifest.metrics[args.metric],
            }
            for each, weight in zip(chosen, weights, strict=True)
        ],
    }
    merged = _made_from(newest, lineage)
    if not args.no_evaluation:
        merged.metrics = _evaluate(newest, aside, sorted(newest.metrics), args.layout)
    publish.finish(aside, target, merged)
    _print_merge(chosen, weights, merged, target)
    return 0


def _average(args: argparse.Namespace) -> int:
    from llada_megatron.checkpoint import average, publish, store

    source = store.verified(find(args.path))
    run = RunDir(source.path.parent.parent)
    target = args.to or run.merged / f"average_{source.manifest.step:08d}"
    aside = publish.begin(target)
    average.write_averaged(source.path, aside / SHARDS)
    carried.write(carried.content_of(source), aside)
    lineage = {"kind": "average", "sources": [{"path": str(source.path), "step": source.manifest.step}]}
    publish.finish(aside, target, _made_from(source.manifest, lineage))
    print(f"{target} holds the averaged weights: evaluate, convert or start from it as from any checkpoint")
    return 0


def _made_from(newest: Manifest, lineage: dict[str, Any]) -> Manifest:
    """Of a checkpoint whose weights are made from those of a run."""
    return Manifest(
        config=newest.config,
        consumed_samples=newest.consumed_samples,
        consumed_tokens=newest.consumed_tokens,
        stage=newest.stage,
        block_size=newest.block_size,
        data_fingerprint=newest.data_fingerprint,
        autoregressive_tokens=newest.autoregressive_tokens,
        lineage=lineage,
    )


def _weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1.0] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(f"--weights {text}: give numbers with commas between them.") from None
    if len(weights) != count or min(weights) < 0 or not sum(weights):
        raise BadInput(f"--weights {text}: give {count} numbers, none negative, not all zero.")
    return weights


def _evaluate(
    manifest: Manifest, checkpoint: Path, metrics: list[str], layout: list[str]
) -> dict[str, float]:
    """The metrics of a checkpoint by its run's own evaluation, in processes of this machine."""
    from llada_megatron.commands.evaluate import evaluate
    from llada_megatron.config import compose, rules
    from llada_megatron.evaluate.likelihood import checkpoint_metrics

    config = compose.elsewhere(manifest.config_of_weights, layout)
    rules.check(config)
    sizes = [name.removeprefix("nll_block") for name in metrics if name != "nll_ar"]
    config.evaluation.block_sizes = sizes
    found = evaluate(config, checkpoint, autoregressive="nll_ar" in metrics)
    return checkpoint_metrics(found["bound"], found["ar"])


def _print_merge(chosen: list[Checkpoint], weights: list[float], merged: Manifest, target: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    metrics = sorted({name for each in chosen for name in each.manifest.metrics})
    table = Table(box=None, pad_edge=False)
    table.add_column("checkpoint", no_wrap=True)
    for name in ("weight", *metrics):
        table.add_column(name, justify="right", no_wrap=True)
    rows = [
        (each.path.name, f"{w:g}", each.manifest.metrics) for each, w in zip(chosen, weights, strict=True)
    ]
    for name, weight, figures in [*rows, ("their mean", "", merged.metrics)]:
        table.add_row(name, weight, *(f"{figures[m]:.4f}" if m in figures else "-" for m in metrics))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"\nThe mean is {target}; start from it with checkpoint.init_from={target}", soft_wrap=True)


def _diff(args: argparse.Namespace) -> int:
    from llada_megatron.checkpoint import merge
    from llada_megatron.config.compose import leaf_differences

    a, b = find(args.a), find(args.b)
    before, after = a.manifest, b.manifest
    said = leaf_differences(before.config, after.config)
    said += [
        f"{name}: {getattr(before, name)} -> {getattr(after, name)}"
        for name in ("step", "consumed_tokens", "stage", "block_size", "git_commit")
        if getattr(before, name) != getattr(after, name)
    ]
    said += leaf_differences({"versions": before.versions}, {"versions": after.versions})
    moved, alone = merge.differences(a.path, b.path)
    said += alone
    for each in moved[:DIFFERENCES_SHOWN]:
        said.append(f"{each.name}: {each.relative_l2:.2e} relative L2, at most {each.largest:.2e}")
    if len(moved) > DIFFERENCES_SHOWN:
        said.append(f"and {len(moved) - DIFFERENCES_SHOWN} more tensors differ")
    print("\n".join(said) or "Configuration and weights are the same.")
    return 1 if said else 0
