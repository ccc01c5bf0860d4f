"""`llada bench`: measurements on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llada_megatron.bench.attention_cases import SUITES
from llada_megatron.bench.checkpoint import WIDTHS
from llada_megatron.commands import full_attention, opened
from llada_megatron.commands.generate import NEXT_TOKENS, add_graphs_argument
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config

EXAMPLE = "llada bench step --json step.json"
STEP_SUITES = ("pretraining", "objectives")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    step = benches.add_parser(
        "step", help="seconds and memory per training step: AR, MDLM, BDLM; SFT, CAP, DPO"
    )
    step.add_argument(
        "--suite",
        choices=STEP_SUITES,
        default="pretraining",
        help="pretraining (default): AR, MDLM and BDLM; objectives: SFT, CAP, DPO, packed against padded",
    )
    step.add_argument("--rounds", type=int, default=8, help="interleaved rounds per case (default 8)")
    step.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    step.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="hydra overrides of the suite")
    attention = benches.add_parser("attention", help="attention executors, correct first and then fast")
    attention.add_argument("--suite", choices=tuple(SUITES), default="cpu", help="cases (default cpu)")
    attention.add_argument("--out", type=Path, metavar="DIR", help="write JSON, CSV and pictures")
    attention.add_argument("--compare", type=Path, metavar="FILE", help="an earlier attention.json")
    checkpoint = benches.add_parser("checkpoint", help="saving, loading, converting: seconds and memory")
    checkpoint.add_argument("--sizes", nargs="+", choices=tuple(WIDTHS), default=list(WIDTHS))
    checkpoint.add_argument(
        "--processes", type=int, default=1, metavar="N", help="data-parallel ones that save and load"
    )
    checkpoint.add_argument(
        "--directory", type=Path, metavar="DIR", help="the disk to measure; default: /tmp"
    )
    checkpoint.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    data = benches.add_parser("data", help="until a run has its data; reading a sequence cold and warm")
    data.add_argument("--shards", type=int, default=4000, metavar="N", help="default 4000")
    data.add_argument("--shard-gb", type=float, default=10.0, metavar="GB", help="of holes (default 10)")
    data.add_argument("--documents", type=int, default=10_000, metavar="N", help="a shard (default 10000)")
    data.add_argument("--directory", type=Path, metavar="DIR", help="the disk to measure; default: /tmp")
    data.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    decode = benches.add_parser("decode", help="decoding with a cache: equal tokens first, then speed")
    opened.add_arguments(decode, default="first weights of model=small")
    decode.add_argument("--rule", metavar="NAME,NAME", help=f"default threshold, or {NEXT_TOKENS}")
    for name, default, what in (
        ("prompt-tokens", 512, "of each prompt"),
        ("new-tokens", 512, "behind each prompt"),
        ("batch", 8, "prompts at a time"),
    ):
        decode.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default {default})"
        )
    decode.add_argument("--block-size", type=int, metavar="B", help="default: of the last stage, or 32")
    full_attention.add_arguments(decode)
    add_graphs_argument(decode)
    decode.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    decode.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings")
    _add_of_models(benches)


def _add_of_models(benches: Any) -> None:
    """What is measured of a model's mathematics more than of this machine."""
    clips = benches.add_parser("clips", help="which mask rates leave the loss the least variance")
    clips.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run: its newest")
    clips.add_argument("--block-sizes", metavar="B,B", help="default: as the run evaluated itself")
    for name, default, what in (("sequences", 16, "held-out sequences"), ("draws", 64, "masks of each")):
        clips.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    clips.add_argument("--out", type=Path, metavar="DIR", help="write clips.json and a picture")
    clips.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings")
    concepts = benches.add_parser("concepts", help="attention of tokens to concepts, ragged and replicated")
    concepts.add_argument("--tokens", type=int, default=2048, metavar="N", help="default 2048")
    concepts.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5")
    concepts.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    mup = benches.add_parser("mup", help="how far steps move activations, over the width, with muP or not")
    mup.add_argument("--out", type=Path, metavar="DIR", help="write mup.json and a picture")
    mup.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings")


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark; 0 when its bounds hold, 1 when one does not or an executor is wrong."""
    if args.bench == "step" and args.rounds < 1:
        raise BadInput(f"--rounds {args.rounds}: give at least 1.")
    if args.bench == "attention":
        return _attention(args)
    if args.bench == "checkpoint":
        from llada_megatron.bench import checkpoint

        if args.processes < 1:
            raise BadInput(f"--processes {args.processes}: give at least 1.")
        return checkpoint.run(
            args.sizes, processes=args.processes, directory=args.directory, json_file=args.json
        )
    if args.bench == "data":
        from llada_megatron.bench import data

        if min(args.shards, args.shard_gb, args.documents) <= 0:
            raise BadInput("--shards, --shard-gb and --documents must be above 0.")
        return data.run(args.shards, args.shard_gb, args.documents, args.directory, args.json)
    if args.bench == "decode":
        return _decode(args)
    if args.bench == "clips":
        return _clips(args)
    if args.bench == "concepts":
        from llada_megatron.bench import concepts

        if min(args.tokens, args.rounds) < 1:
            raise BadInput("--tokens and --rounds must be at least 1.")
        concepts.run(args.tokens, args.rounds, args.json)
        return 0
    if args.bench == "mup":
        from llada_megatron.bench import mup

        mup.run(args.overrides, args.out)
        return 0
    from llada_megatron.bench import objectives, step

    suite = step if args.suite == "pretraining" else objectives
    return suite.run(args.overrides, rounds=args.rounds, json_file=args.json)


def _decode(args: argparse.Namespace) -> int:
    from llada_megatron.bench import decode
    from llada_megatron.commands.generate import configuration, refuse_blocks, way_of
    from llada_megatron.config.compose import compose
    from llada_megatron.config.families import formulas_of

    for name in ("prompt_tokens", "new_tokens", "batch"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least 1.")
    if args.checkpoint and "=" in args.checkpoint:
        args.overrides, args.checkpoint = [args.checkpoint, *args.overrides], None
    block_size = args.block_size or 32

    def measured(path: Path | None, config: Config, block_size: int, full: dict[str, str] | None) -> int:
        tokens = args.prompt_tokens, args.new_tokens
        rules = (args.rule or ("threshold" if block_size else NEXT_TOKENS)).split(",")
        setting = decode.Setting(rules, block_size, *tokens, args.batch, full, args.cuda_graphs)
        return decode.run(config, path, setting, args.json)

    if not args.checkpoint:
        full = full_attention.settings_for(args, None)
        config = compose(["experiment=bench", "data.path=[]", *args.overrides])
        if formulas_of(config.model).FILLS_MASKS:
            return measured(None, config, block_size, full)
        refuse_blocks(args, f"model.family={config.model.family}", config)
        return measured(None, config, 0, None)
    with opened.opened(args) as checkpoint:
        config = configuration(checkpoint, args.overrides)
        _, full, block_size = way_of(args, checkpoint, config)
        return measured(checkpoint.path, config, block_size, full)


def _clips(args: argparse.Namespace) -> int:
    from llada_megatron.bench import clips
    from llada_megatron.config import compose
    from llada_megatron.config.schedule import block_size_of
    from llada_megatron.record.manifest import find

    for name in ("sequences", "draws"):
        if getattr(args, name) < 2:
            raise BadInput(f"--{name} {getattr(args, name)}: give at least 2.")
    checkpoint = find(args.checkpoint)
    settings = [f"evaluation.sequences={args.sequences}", "layout.processes=1"]
    if args.block_sizes is not None:
        settings.append(f"evaluation.block_sizes=[{args.block_sizes}]")
    config = compose.elsewhere(checkpoint.manifest.config_of_weights, settings + args.overrides)
    length = config.data.sequence_length
    sizes = [block_size_of(size, length, "--block-sizes") for size in config.evaluation.block_sizes]
    clips.run(config, checkpoint.path, sizes, draws=args.draws, out=args.out)
    return 0


def _attention(args: argparse.Namespace) -> int:
    from llada_megatron.bench import attention, attention_report

    old = None if args.compare is None else attention_report.read_times(args.compare)
    results = attention.run(SUITES[args.suite])
    machine = attention.machine()
    attention_report.print_table(results, machine)
    if args.out is not None:
        attention_report.write(results, machine, args.out)
    if old is not None:
        attention_report.print_changes(results, old)
    return 0 if all(result.correct for result in results) else 1
