"""`llada demo`: text, an autoregressive MoE, its conversion through the block-size schedule, and a report."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from llada_megatron.config.schema import Config

EXAMPLE = "llada demo"
DATA_DIR = Path("runs/data")
SHORT_DIVISOR = 16
"""`--short` keeps every stage and gives each this fraction of its tokens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--short", action="store_true", help="every stage, few tokens: shows that it runs")
    parser.add_argument("--experiment", default="demo", help="demo, or demo_direct (block 32 at once)")
    parser.add_argument("--processes", type=int, default=2, help="processes that share the CPU (default 2)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="hydra overrides for both runs")


def run(args: argparse.Namespace) -> int:
    """Run the whole demo; a second call goes on from what is there."""
    from llada_megatron.observe.command import print_summary
    from llada_megatron.observe.report import write_report

    began = time.monotonic()
    shared = [f"layout.processes={args.processes}", *args.overrides]
    name = f"{args.experiment}_short" if args.short else args.experiment
    base = Path("runs") / name
    autoregressive_dir = Path("runs/demo_short" if args.short else "runs/demo") / "ar"
    autoregressive = compose(["experiment=demo_ar", f"run.dir={autoregressive_dir}", *shared])
    conversion = compose(
        [
            f"experiment={args.experiment}",
            f"run.dir={base}",
            f"run.name={name}",
            f"checkpoint.init_from={autoregressive_dir}",
            *shared,
        ]
    )
    if args.short:
        for config in (autoregressive, conversion):
            _shorten(config)

    _say("1/4  text: documentation and docstrings that this Python carries")
    _prepare_text()
    _say("2/4  an autoregressive Mixture-of-Experts model learns the text")
    _train(autoregressive)
    _say("3/4  it becomes a block-diffusion model, stage by stage")
    _train(conversion)
    _say("4/4  report")
    write_report(base)
    print_summary(base)
    minutes = (time.monotonic() - began) / 60
    print(f"The demo took {minutes:.1f} minutes.")
    return 0


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _prepare_text() -> None:
    from llada_megatron.data.prepare import prepare_corpus
    from llada_megatron.data.python_text import write_python_text

    if (DATA_DIR / "python.json").is_file():
        print(f"{DATA_DIR}/python.bin is there already")
        return
    DATA_DIR.mkdir(parents=True, exist_ok=True)
    documents = write_python_text(DATA_DIR / "text.jsonl")
    summary = prepare_corpus([DATA_DIR / "text.jsonl"], DATA_DIR / "python")
    print(f"{documents} documents, {summary['tokens']:,} tokens (bytes)")


def _train(config: Config) -> None:
    from llada_megatron.train import train

    schedule = rules.check(config)
    outcome = train(config)
    if outcome.signal:
        raise KeyboardInterrupt
    print(f"{schedule.total_steps} steps, {schedule.total_tokens:,} tokens: {config.run.dir}")


def _shorten(config: Config) -> None:
    config.evaluation.sequences = 8
    for stage in config.schedule.stages:
        stage.tokens = max(1, stage.tokens // SHORT_DIVISOR)
    config.optimizer.warmup_tokens //= SHORT_DIVISOR
    config.optimizer.wsd_decay_tokens //= SHORT_DIVISOR
