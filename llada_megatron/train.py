"""`llada train`, also as `python -m llada_megatron.train` under torchrun or srun.

Composes, validates, and starts the processes that the layout asks for, unless a launcher already did.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.config import compose, rules
from llada_megatron.config.schema import Config
from llada_megatron.runtime import launch

if TYPE_CHECKING:
    from llada_megatron.training.loop import Outcome

EXAMPLE = "llada train experiment=parity run.name=first training.steps=4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--check", action="store_true", help="compose, validate and print what would run")
    parser.add_argument("--config", metavar="FILE", help="a resolved config.yaml instead of overrides")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="hydra overrides, experiment=NAME first")


def run(args: argparse.Namespace) -> int:
    """Train to the end (0), to a signal (128 + its number), or say what would run (--check)."""
    config = compose.load(args.config) if args.config else compose.compose(args.overrides)
    schedule = rules.check(config)
    if args.check:
        print(description(config))
        return 0
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:
        run_dir = Path(config.run.dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        compose.save(config, run_dir / "config.yaml")
    outcome = train(config)
    if outcome.signal:
        print(
            f"Stopped by signal {outcome.signal} after step {outcome.step} of {schedule.total_steps};"
            " the same command goes on from there."
        )
        return 128 + outcome.signal
    return 0


def train(config: Config) -> Outcome:
    """Run the configuration on its processes; returns rank 0's outcome."""
    if launch.already_started() or config.layout.processes == 1:
        from llada_megatron.training import loop

        return loop.run(config)
    return launch.launch(
        _worker, config, processes=config.layout.processes, preload="llada_megatron.training.loop"
    )[0]


def _worker(config: Config) -> Outcome:
    from llada_megatron.training import loop

    return loop.run(config)


def description(config: Config) -> str:
    """What a run would do, for people: model, layout, and the schedule with effective tokens."""
    schedule = rules.schedule_of(config)
    layout = config.layout
    lines = [
        f"run       {config.run.name} in {config.run.dir}",
        f"model     {config.model.layers} layers, hidden {config.model.hidden_size}, {config.model.experts} experts,"
        f" vocabulary {config.model.vocab_size}",
        f"layout    {layout.processes} processes: tp {layout.tp}, pp {layout.pp}, cp {layout.cp}, ep {layout.ep},"
        f" dp {rules.data_parallel_size(layout)}; global batch {layout.global_batch}",
        f"data      {', '.join(config.data.path) or '(data.path is not set)'}; L = {config.data.sequence_length}",
        "",
        f"{'stage':<14} {'objective':<15} {'block':>6} {'steps':>9} {'tokens':>17} {'micro-batch':>12}",
    ]
    lines += [
        f"{s.name:<14} {s.objective.value:<15} {s.block_size:>6} {s.steps:>9} {s.tokens:>17,} {s.micro_batch:>12}"
        for s in schedule.stages
    ]
    lines.append(f"{'total':<14} {'':<15} {'':>6} {schedule.total_steps:>9} {schedule.total_tokens:>17,}")
    return "\n".join(lines)


if __name__ == "__main__":
    from llada_megatron.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
