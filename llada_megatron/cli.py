"""`llada VERB ...`: parse, dispatch, exit codes.

A verb's module offers `add_arguments(parser)`, `run(args) -> int` and, if it likes, `EXAMPLE` (one runnable
command). It is imported when its verb is called, so that `llada --help` answers without importing torch.

Exit codes: what the verb returns (0 is success), otherwise those of config/errors.py; 1 for a bug.
"""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from llada_megatron.config.errors import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    READER_LEFT,
    Interrupted,
    Refusal,
    in_words,
    limit_met,
)

VERBS = {
    "train": ("llada_megatron.commands.train", "convert or train a model as a configuration says"),
    "data": ("llada_megatron.commands.data", "prepare, pack and inspect training data"),
    "checkpoint": ("llada_megatron.commands.checkpoint", "list, verify, merge and compare checkpoints"),
    "convert": ("llada_megatron.commands.convert", "Hugging Face checkpoints in and out, with a certificate"),
    "plan": ("llada_megatron.commands.plan", "memory, time and traffic of a layout; the best layouts"),
    "plan calibrate": ("llada_megatron.commands.plan_calibrate", "fit a cluster's description to benchmarks"),
    "fit": ("llada_megatron.commands.fit", "a scaling law of runs, and the sizes that a budget buys"),
    "submit": ("llada_megatron.commands.submit", "a run becomes a Slurm job that survives limits and faults"),
    "status": ("llada_megatron.commands.status", "where runs are, and why they stopped"),
    "logs": ("llada_megatron.commands.logs", "one rank's log, or all of them, errors first"),
    "stop": ("llada_megatron.commands.stop", "save, end, and wait for `llada resume`"),
    "resume": ("llada_megatron.commands.resume", "submit a stopped or failed run again"),
    "profile": ("llada_megatron.commands.profile", "what a run that trains computes, step by step"),
    "cost": ("llada_megatron.commands.cost", "where a run's time went, attempt by attempt, and what it cost"),
    "verify": ("llada_megatron.commands.verify", "golden cases, layouts, resumed runs, context parallelism"),
    "bench": ("llada_megatron.commands.bench", "measure attention executors, training steps, checkpoints"),
    "generate": ("llada_megatron.commands.generate", "what a checkpoint writes after prompts"),
    "chat": ("llada_megatron.commands.chat", "a conversation with a checkpoint, in the terminal"),
    "eval": ("llada_megatron.commands.eval", "scores of a checkpoint on tasks, by lm-eval"),
    "evaluate": ("llada_megatron.commands.evaluate", "bound and NLL of a checkpoint on prepared text"),
    "score": ("llada_megatron.commands.score", "bounds of a preference's reference, once"),
    "report": ("llada_megatron.commands.report", "render a run's report with pictures"),
    "sync": ("llada_megatron.commands.sync", "upload a run's offline wandb records from a login node"),
    "demo": ("llada_megatron.commands.demo", "run the whole pipeline, small, on this machine"),
    "doctor": (
        "llada_megatron.commands.doctor",
        "what this machine offers a run, and how to get what is missing",
    ),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with the project's defaults, which sub-parsers made from it inherit."""

    def __init__(self, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "allow_abbrev": False,
            "formatter_class": argparse.RawDescriptionHelpFormatter,
        }
        super().__init__(**(defaults | options))
        self.commands: argparse._SubParsersAction[Parser] | None = None

    def add_subparsers(self, **options: Any) -> argparse._SubParsersAction[Parser]:  # type: ignore[override]
        self.commands = super().add_subparsers(**options)
        return self.commands

    def parse_mixed(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse KEY=VALUE before and behind options, which argparse does in no sub-command by itself."""
        if self.commands is None:
            return self.parse_intermixed_args(arguments)
        if not arguments or arguments[0] not in self.commands.choices:
            return self.parse_args(arguments)
        args = self.commands.choices[arguments[0]].parse_mixed(arguments[1:])
        setattr(args, self.commands.dest, arguments[0])
        return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run `llada` with `argv` (default: the process's arguments) and return its exit code.

    Raises SystemExit (2 on a usage error, 0 after --help) and any exception that is a bug.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Only the verb, of one word or two, is the front door's: what follows belongs to it, --help included.
    words = 2 if " ".join(arguments[:2]) in VERBS else 1
    verb = front_parser().parse_args([" ".join(arguments[:words])] if arguments else []).verb
    try:
        module, args = parse(verb, arguments[words:])
        return run(verb, module, args)
    except KeyboardInterrupt as interrupted:
        return interrupted.exit_code if isinstance(interrupted, Interrupted) else INTERRUPTED


def parse(verb: str, arguments: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    module_name, summary = VERBS[verb]
    module = importlib.import_module(module_name)
    example = getattr(module, "EXAMPLE", None)
    parser = Parser(prog=f"llada {verb}", description=summary, epilog=example and f"example:\n  {example}")
    module.add_arguments(parser)
    return module, parser.parse_mixed(arguments)


def run(verb: str, module: ModuleType, args: argparse.Namespace) -> int:
    try:
        code = module.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if reader_left():
            return READER_LEFT
        raise
    except Refusal as refusal:
        return explain(verb, str(refusal), refusal.exit_code)
    except OSError as error:
        # A bare OSError without a number is no answer of the operating system (inspect raises such, for one).
        if error.errno is None:
            raise
        return explain(verb, in_words(error), BAD_INPUT)
    except Exception as error:
        if limit := limit_met(error):
            return explain(verb, limit, FAILED)
        raise


def explain(verb: str, why: str, code: int) -> int:
    """Print why a verb ends, with a traceback under LLADA_DEBUG=1; returns the exit code."""
    if os.environ.get("LLADA_DEBUG") == "1":
        traceback.print_exc()
    print(f"llada {verb}: error: {why}", file=sys.stderr)
    return code


def reader_left() -> bool:
    """Whether nobody reads standard output any more, as in `llada ... | head`; the rest then goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # a pipe without a reader is in error, asked for or not
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def front_parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    table = "\n".join(f"  {verb:{width}}  {summary}" for verb, (_, summary) in VERBS.items())
    parser = Parser(
        prog="llada",
        usage="llada VERB ...",
        description="Turn autoregressive Mixture-of-Experts models into block-diffusion models.",
        epilog=f"verbs:\n{table}\n\n`llada VERB --help` shows options; LLADA_DEBUG=1 shows tracebacks.",
    )
    parser.add_argument("verb", metavar="VERB", choices=VERBS, help="what to do")
    return parser
