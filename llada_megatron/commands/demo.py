"""`llada demo`: text, an autoregressive MoE, its conversion through the block-size schedule, and a report.

The MoE is trained here, or comes from a pretrained model (demo/pretrained.py). In two others a small model
learns to answer (demo/conversations.py; demo/road.py, which goes on to CAP, DPO and scores).
"""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

from llada_megatron import cli
from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import Interrupted, RunFailed
from llada_megatron.config.schema import Config
from llada_megatron.demo import conversations, pretrained, road

EXAMPLE = "llada demo"
DATA_DIR = Path("runs/data")
TEXT = DATA_DIR / "text.jsonl"
SHORT_DIVISOR = 16
"""`--short` keeps every stage and gives each this fraction of its tokens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--short", action="store_true", help="every stage, few tokens: shows that it runs")
    parser.add_argument(
        "--experiment",
        default="demo",
        help="demo, demo_direct (block 32 at once), demo_smollm2 (a pretrained model: make demo-smollm2),"
        " sft_small (conversations: make sft-small), or demo_chat (the whole road: make demo-chat)",
    )
    parser.add_argument(
        "--processes", type=int, help="processes that share the CPU (default 2; 1 for demo_smollm2)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="hydra overrides for every run")


def run(args: argparse.Namespace) -> int:
    """Run the whole demo; a second call goes on from what is there."""
    from llada_megatron.commands.report import print_summary
    from llada_megatron.observe.report import write_report

    began = time.monotonic()
    name = f"{args.experiment}_short" if args.short else args.experiment
    base = Path("runs") / name
    if args.experiment == road.EXPERIMENT:
        _whole_road(args, base)
        _took(began)
        return 0
    starts = {pretrained.EXPERIMENT: _pretrained, conversations.EXPERIMENT: _on_text}
    start = starts.get(args.experiment, _trained_here)
    config = start(args, [f"run.dir={base}", f"run.name={name}"])
    is_chat = args.experiment == conversations.EXPERIMENT
    _say(f"3/4  it {'learns to answer' if is_chat else 'becomes a block-diffusion model, stage by stage'}")
    _train(config)
    _say("4/4  report")
    write_report(base)
    print_summary(base)
    for step in conversations.evaluations(config) if is_chat else []:
        run_step(step)
    _took(began)
    return 0


def _took(began: float) -> None:
    print(f"The demo took {(time.monotonic() - began) / 60:.1f} minutes.")


def _trained_here(args: argparse.Namespace, overrides: list[str]) -> Config:
    """The conversion's configuration, once the autoregressive model that it starts from is trained."""
    overrides = [*overrides, f"layout.processes={args.processes or 2}"]
    directory = Path("runs/demo_short" if args.short else "runs/demo") / "ar"
    origin = [*overrides, f"run.dir={directory}", "run.name=demo_ar", *args.overrides]
    autoregressive = _compose(args, "demo_ar", origin)
    conversion = _compose(
        args, args.experiment, [*overrides, f"checkpoint.init_from={directory}", *args.overrides]
    )
    _say("1/4  text: documentation and docstrings that this Python carries")
    _prepare_text()
    _say("2/4  an autoregressive Mixture-of-Experts model learns the text")
    _train(autoregressive)
    return conversion


def _on_text(args: argparse.Namespace, overrides: list[str]) -> Config:
    """The configuration of learning conversations, once the base model has learnt text."""
    processes = f"layout.processes={args.processes or 2}"
    directory = Path("runs/sft_small_short" if args.short else "runs/sft_small") / "base"
    origin = [processes, f"run.dir={directory}", *args.overrides]
    base = _compose(args, conversations.BASE, origin)
    start = f"checkpoint.init_from={directory}"
    chats = _compose(args, args.experiment, [*overrides, processes, start, *args.overrides])
    _say("1/4  text and conversations: of this Python, and of the package chatterbot-corpus")
    files = conversations.yaml_files("make sft-small")
    _prepare_text()
    _prepare_chats(files, Path(chats.data.path[0]))
    _say("2/4  a small model learns the text: next tokens, then blocks of 32")
    _train(base)
    return chats


def _whole_road(args: argparse.Namespace, base: Path) -> None:
    """Text, next tokens, blocks, answers, CAP, DPO, and what each model scores under which rule."""
    from llada_megatron.demo import questions
    from llada_megatron.harness import tasks
    from llada_megatron.observe.report import write_report

    tasks.prepare()  # before questions import what it keeps quiet
    folder, processes = base / "questions", args.processes or 2
    count = len(road.STAGES) + 2
    _say(f"1/{count}  questions of reasoning-gym's programs, conversations of the package chatterbot-corpus")
    if not (folder / "tries.jsonl").is_file():
        counts = questions.write(folder, divisor=SHORT_DIVISOR if args.short else 1)
        print(", ".join(f"{lines:,} {name}" for name, lines in counts.items()))
    run_step(road.preparation(folder, "text", "text"))
    run_step(road.preparation(folder, "chats", "chat"))
    before: Path | None = None
    for number, stage in enumerate(road.STAGES, 2):
        _say(f"{number}/{count}  {road.SAYS[stage]}")
        if stage == "dpo":
            _prepare_pairs(base, folder, processes)
        data = folder / road.DATA[stage]
        overrides = [f"run.dir={base / stage}", f"data.path=[{data}]", f"layout.processes={processes}"]
        overrides += [] if before is None else [f"checkpoint.init_from={before}"]
        _train(_compose(args, f"{road.EXPERIMENT}_{stage}", [*overrides, *args.overrides]))
        before = base / stage
    _say(f"{count}/{count}  what each model answers, and how fast, under which rule")
    for step in road.evaluations(base, folder, processes, limit=10 if args.short else None):
        run_step(step)
    for stage in road.STAGES:
        print(f"Report: {write_report(base / stage).page}")


def _prepare_pairs(base: Path, folder: Path, processes: int) -> None:
    from llada_megatron.demo import questions

    run_step(road.tries(base, folder, processes))
    if not (folder / "pairs.jsonl").is_file():
        counts = questions.write_pairs(folder / "tried.jsonl", folder / "pairs.jsonl")
        print(f"{folder}/pairs.jsonl: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    run_step(road.preparation(folder, "pairs", "preference"))
    run_step(road.reference(base, folder, processes))


def _pretrained(args: argparse.Namespace, overrides: list[str]) -> Config:
    """The conversion's configuration, once the pretrained model is converted and upcycled."""
    # One process: with two, the gradients' way through gloo costs more than threads lose.
    overrides, layers = [*overrides, f"layout.processes={args.processes or 1}"], None
    if args.short:
        layers, folder = pretrained.SHORT_LAYERS, "runs/smollm2_short"
        overrides = [
            *overrides,
            f"model.layers={layers}",
            f"model.dense_layers={pretrained.SHORT_DENSE_LAYERS}",
            f"data.tokenizer={folder}/hf/tokenizer.json",
            f"checkpoint.init_from={folder}/moe",
        ]
    conversion = _compose(args, args.experiment, [*overrides, *args.overrides])
    _say("1/4  a pretrained model: SmolLM2-135M-Instruct from its GGUF file, then a Mixture of Experts")
    for step in pretrained.conversion(conversion, layers=layers):
        run_step(step)
    _say("2/4  text: documentation and docstrings that this Python carries, in the model's tokens")
    _write_text()
    run_step(pretrained.preparation(conversion, TEXT))
    pretrained.print_autoregressive_nll(conversion)
    return conversion


def _compose(args: argparse.Namespace, experiment: str, overrides: list[str]) -> Config:
    config = compose([f"experiment={experiment}", *overrides])
    if args.short:
        _shorten(config)
    return config


def run_step(step: pretrained.Step) -> None:
    """Print and run a command whose result is not there yet; RunFailed when it fails."""
    if step.result.exists():
        print(f"{step.result} is there already")
        return
    print(f"$ {shlex.join(['llada', *step.command])}", flush=True)
    verb, *arguments = step.command
    module, parsed = cli.parse(verb, arguments)
    if module.run(parsed):
        raise RunFailed(f"llada {verb} {arguments[0]} failed: its output above says why.")


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _prepare_text() -> None:
    from llada_megatron.data.prepare import prepare_corpus

    if (DATA_DIR / "python.json").is_file():
        print(f"{DATA_DIR}/python.bin is there already")
        return
    _write_text()
    summary = prepare_corpus([TEXT], DATA_DIR / "python")
    print(f"{summary['documents']} documents, {summary['tokens']:,} tokens (bytes)")


def _prepare_chats(files: list[Path], prefix: Path) -> None:
    lines = prefix.with_suffix(".jsonl")
    if not lines.is_file():
        print(f"{lines}: {conversations.write_chats(files, lines)} conversations")
    prepare = ["data", "prepare", "--format", "chat", "--input", str(lines), "--output", str(prefix)]
    run_step(pretrained.Step(Path(f"{prefix}.idx"), prepare))


def _write_text() -> None:
    from llada_megatron.data.python_text import write_python_text

    if not TEXT.is_file():
        write_python_text(TEXT)


def _train(config: Config) -> None:
    from llada_megatron.commands.train import train

    schedule = rules.check(config)
    outcome = train(config)
    if outcome.signal:
        raise Interrupted(outcome.signal)
    print(f"{schedule.total_steps} steps, {schedule.total_tokens:,} tokens: {config.run.dir}")


def _shorten(config: Config) -> None:
    config.evaluation.sequences = max(2, config.evaluation.sequences // 8)
    for stage in config.schedule.stages:
        stage.tokens = max(1, stage.tokens // SHORT_DIVISOR)
    config.optimizer.warmup_tokens //= SHORT_DIVISOR
    config.optimizer.wsd_decay_tokens //= SHORT_DIVISOR
