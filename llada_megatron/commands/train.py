"""`llada train`, also as `python -m llada_megatron train` under torchrun or srun.

Composes, validates, and starts the processes that the layout asks for, unless a launcher already did.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

from llada_megatron.commands.check import check
from llada_megatron.config import compose, rules
from llada_megatron.config.errors import (
    ABOUT_A_PATH,
    FAILED,
    BadInput,
    NodeFault,
    Refusal,
    RunFailed,
    in_words,
)
from llada_megatron.config.layout import data_parallel_size, expert_data_parallel_size, pipeline_stages
from llada_megatron.config.schema import Config, Recompute
from llada_megatron.jobs import attempts
from llada_megatron.record import events
from llada_megatron.record.outcome import Outcome
from llada_megatron.record.run_dir import RunDir
from llada_megatron.runtime import interrupts, launch

EXAMPLE = "llada train experiment=parity run.name=first training.steps=4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "--check",
        action="store_true",
        help="print what would run, and what of it a start would refuse",
    )
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="start again after a failure, at most run.max_failures in a row",
    )
    parser.add_argument("--config", metavar="FILE", help="a resolved config.yaml instead of overrides")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="hydra overrides, experiment=NAME first"
    )


def run(args: argparse.Namespace) -> int:
    """Train to the end (0), to a signal (128 + its number), or say what would run (--check)."""
    if args.config and args.overrides:
        raise BadInput("--config FILE is a whole configuration: leave out the overrides, or --config.")
    config = compose.load(args.config) if args.config else compose.compose(args.overrides)
    rules.check(config)
    if args.check:
        print(description(config), flush=True)
        check(config)
        return 0
    outcome = supervise(config) if args.supervise else train(config)
    if outcome.signal:
        print(
            f"Stopped by signal {outcome.signal} after step {outcome.step} of {outcome.total_steps};"
            " the same command goes on from there."
        )
        return 128 + outcome.signal
    return 0


def train(config: Config) -> Outcome:
    """Run the configuration on its processes; returns rank 0's outcome.

    What refuses the run is on its record, where the job around it finds it (jobs/attempts.py).
    """
    began = time.time()
    launch.set_environment(str(RunDir(config.run.dir).last_messages))
    try:
        if launch.already_started():
            return _worker(config)
        if interrupts.remembered:  # nothing was started yet
            step, steps = RunDir(config.run.dir).newest_step(), rules.schedule_of(config).total_steps
            return Outcome(step, steps, interrupts.remembered[-1], finished=False)
        return launch.launch(
            _worker, config, processes=config.layout.processes, preload="llada_megatron.training.loop"
        )[0]
    except launch.WorkerDied as death:
        raise launch.WorkerDied(
            f"{death}{_stacks_left_since(began, config)}; the same command goes on from the last checkpoint."
        ) from None
    except Refusal as refusal:
        _record(config, refusal)
        raise
    except OSError as error:
        if error.errno is None:
            raise
        is_final = error.errno in ABOUT_A_PATH  # another start would find the same
        failure = (BadInput if is_final else RunFailed)(in_words(error))
        _record(config, failure)
        raise failure from error


def _record(config: Config, refusal: Refusal) -> None:
    if int(os.environ.get("LOCAL_RANK", "0")):  # one rank per node; any may be the only one that knows
        return
    with contextlib.suppress(OSError):  # the run's directory may be what is at fault
        events.append(
            Path(config.run.dir),
            "refused",
            job=os.environ.get("SLURM_JOB_ID", ""),
            exit_code=refusal.exit_code,
            reason=str(refusal),
            nodes=list(refusal.nodes) if isinstance(refusal, NodeFault) else [],
        )


def supervise(config: Config) -> Outcome:
    """Train, and start again after a failure as a job under Slurm does: the same cap, the same record.

    Raises what the last attempt raised: bad input at once, a failure when there were run.max_failures of them
    in a row without a new checkpoint.
    """
    run_dir = Path(config.run.dir)
    while True:
        attempts.start(run_dir, devices=config.layout.processes)
        try:
            outcome = train(config)
        except (Refusal, launch.WorkerError) as failure:
            code = failure.exit_code if isinstance(failure, Refusal) else FAILED
            verdict = attempts.decide(run_dir, code, max_failures=config.run.max_failures, error=str(failure))
            attempts.end(run_dir, code, verdict)
            if verdict.outcome != "again":
                raise
            print(f"{failure}\nstarting again", file=sys.stderr, flush=True)
        else:
            asked = attempts.Verdict("stopped", "a signal asked for it; the same command goes on")
            finished = attempts.decide(run_dir, 0, max_failures=config.run.max_failures)
            attempts.end(
                run_dir, 128 + outcome.signal if outcome.signal else 0, asked if outcome.signal else finished
            )
            return outcome


def _stacks_left_since(began: float, config: Config) -> str:
    """What to add when the watchdog (guard/watchdog.py) ended a process."""
    run, training = RunDir(config.run.dir), config.training
    if not any(file.stat().st_size and file.stat().st_mtime >= began for file in run.all_stacks()):
        return ""
    return (
        f": no progress for training.hang_timeout_sec={training.hang_timeout_sec:g}, or a stop that took"
        f" training.stop_deadline_sec={training.stop_deadline_sec:g}; every process's stacks are in"
        f" {run.stacks}"
    )


def _worker(config: Config) -> Outcome:
    interrupts.handle(interrupts.remember)  # before the imports, of which some catch everything
    from llada_megatron.training import loop

    return loop.run(config)


def description(config: Config) -> str:
    """What a run would do, for people: model, layout, and the schedule with effective tokens."""
    schedule, model, layout = rules.schedule_of(config), config.model, config.layout
    axes = ", ".join(f"{axis} {getattr(layout, axis)}" for axis in ("tp", "pp", "vpp", "cp", "ep", "etp"))
    own = {stage.name: config.schedule.stages[stage.index].path for stage in schedule.stages}
    paths = ", ".join(config.data.path) or "(data.path is not set)"
    paths += "".join(f"; {name}: {', '.join(path)}" for name, path in own.items() if path)
    lines = [
        f"run       {config.run.name} in {config.run.dir}",
        f"model     {model.layers} layers, hidden size {model.hidden_size}, {model.experts} experts,"
        f" vocabulary {model.vocab_size}",
        f"layout    {layout.processes} processes: {axes}, dp {data_parallel_size(layout)}",
        f"          {'; '.join(_layout_options(config))}",
        f"data      {paths}",
        "",
        f"{'stage':<14} {'objective':<15} {'L':>6} {'block':>6} {'steps':>9} {'tokens':>17} {'batch':>6}"
        f" {'micro-batch':>12}",
    ]
    for stage in schedule.stages:
        lines.append(
            f"{stage.name:<14} {stage.objective:<15} {stage.sequence_length:>6} {stage.block_size:>6}"
            f" {stage.steps:>9} {stage.tokens:>17,} {stage.global_batch:>6} {stage.micro_batch:>12}"
        )
    lines.append(
        f"{'total':<14} {'':<15} {'':>6} {'':>6} {schedule.total_steps:>9} {schedule.total_tokens:>17,}"
    )
    return "\n".join(lines)


def _layout_options(config: Config) -> list[str]:
    layout, options = config.layout, []
    if layout.pp > 1:
        options.append(
            f"layers per stage {', '.join(map(str, pipeline_stages(config.model.layers, layout)))}"
        )
    if config.model.has_experts:
        options.append(f"expert dp {expert_data_parallel_size(layout)}, {layout.dispatcher.value} dispatcher")
    modules = f" ({', '.join(layout.recompute_modules)})" if layout.recompute is Recompute.selective else ""
    options.append(f"recompute {layout.recompute.value}{modules}")
    overlaps = [name for name in ("grad_reduce", "param_gather") if getattr(layout, f"overlap_{name}")]
    options.append(f"overlap {' and '.join(overlaps) or 'none'}")
    return options
