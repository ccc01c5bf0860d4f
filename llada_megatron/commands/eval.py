"""`llada eval`: scores of a checkpoint on tasks, by lm-eval, for one decoding rule or several.

Tasks become requests in this process, and answers results; the ranks of the layout see tokens alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.commands import generate, opened
from llada_megatron.config.errors import BadInput
from llada_megatron.record.json_files import write_json, write_json_lines
from llada_megatron.tasks.code_execution import allow_code

if TYPE_CHECKING:
    from llada_megatron.config.schema import Config
    from llada_megatron.harness.asking import Wording
    from llada_megatron.record.manifest import Checkpoint

PRELOAD = "llada_megatron.evaluate.answers"
DRAWS = 32
EXAMPLE = "llada eval runs/chat --tasks my_task --include-path tasks --threshold 0.5,0.9 --json scores.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = (
        "Scores of a checkpoint on tasks, by lm-eval: texts and likelihoods of questions. The likelihood"
        " bound of prepared text at several block sizes is `llada evaluate`."
    )
    opened.add_arguments(parser, default="none, with --list")
    parser.add_argument("--tasks", metavar="A,B", help="names, patterns with *, or files of lm-eval's tasks")
    parser.add_argument(
        "--list", action="store_true", help="this package's tasks and those of --include-path"
    )
    parser.add_argument(
        "--include-path", type=Path, action="append", default=[], metavar="DIR", help="more tasks, as .yaml"
    )
    parser.add_argument("--limit", type=float, metavar="N", help="questions of each task; below 1 a share")
    parser.add_argument("--fewshot", type=int, metavar="N", help="examples before a question")
    parser.add_argument("--chat", action="store_true", help="questions are a user's: apply the chat template")
    parser.add_argument(
        "--draws", type=int, default=DRAWS, metavar="N", help=f"masks of a continuation (default {DRAWS})"
    )
    parser.add_argument("--allow-code", action="store_true", help="run programs that the model wrote")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="lm-eval's results; of several decodings one FILE each; answers beside it as .samples.jsonl",
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="prompts of a forward (default 8)")
    generate.add_decoding_arguments(parser, new_tokens=None)


def run(args: argparse.Namespace) -> int:
    """Ask, answer, score and print: 0; BadInput for a checkpoint, task, rule or layout that do not fit."""
    from llada_megatron.harness import tasks

    tasks.prepare()
    if args.list:
        for name, kind in tasks.names(args.include_path).items():
            print(f"{name}  {kind}")
        return 0
    if not args.checkpoint or not args.tasks:
        raise BadInput("Give a checkpoint and --tasks, or --list to see which there are.")
    if args.allow_code:
        allow_code()
    wanted = [name.strip() for name in args.tasks.split(",") if name.strip()]
    loaded = tasks.load(wanted, args.include_path, fewshot=args.fewshot)
    tasks.check_code(loaded["tasks"], allowed=args.allow_code)
    with opened.opened(args) as checkpoint:
        written = _evaluate(args, checkpoint, loaded)
    for results in written:
        _print(results)
    return 0


def _evaluate(args: argparse.Namespace, checkpoint: Checkpoint, loaded: dict[str, Any]) -> list[Any]:
    from llada_megatron.harness.asking import requests_of
    from llada_megatron.harness.results import results_of
    from llada_megatron.runtime.launch import launch

    config, wording, job = prepare(args, checkpoint)
    kinds = {task.get_config("output_type") for task in loaded["tasks"].values()}
    if "generate_until" in kinds and not (job["block_size"] or generate.predicts_next(checkpoint, args.rule)):
        generate.block_size_for(checkpoint, args.block_size)  # says why it cannot be decoded
    generations, scores = requests_of(loaded["tasks"], wording, limit=args.limit)
    for name, count in wording.cut.items():
        if count:
            print(
                f"warning: {name}: {count} prompts lost their beginning to fit the context", file=sys.stderr
            )
    answers, decodings = launch(
        _on_this_rank,
        config,
        job | {"generations": generations, "scores": scores},
        processes=config.layout.processes,
        preload=PRELOAD,
    )[0]
    model = {
        "checkpoint": args.checkpoint,
        "step": checkpoint.manifest.step,
        "block_size": job["block_size"],
        **({} if job["full"] is None else {"full_attention": job["full"]}),
        "draws": args.draws,
        "seed": args.seed,
        "layout": {axis: getattr(config.layout, axis) for axis in ("processes", "tp", "ep", "etp")},
    }
    written = []
    for decoding in decodings or [{"name": "", "rule": None, "settings": {}}]:
        results = results_of(
            loaded,
            answers,
            decoding,
            wording,
            limit=args.limit,
            model=model,
            allows_code=args.allow_code,
        )
        samples = results.pop("samples")
        if args.json is not None:
            path = _file_of(args.json, decoding["name"] if len(decodings) > 1 else "")
            lines = ({"task": task, **each} for task, those in samples.items() for each in those)
            write_json_lines(path.with_suffix(".samples.jsonl"), lines)
            write_json(path, results)
        written.append(results)
    if job["partial"] is not None:
        job["partial"].unlink()
    return written


def prepare(args: argparse.Namespace, checkpoint: Checkpoint) -> tuple[Config, Wording, dict[str, Any]]:
    """The configuration, how text becomes tokens, and the arguments of EvaluationJob but for the requests.

    EvaluationJob itself takes torch along, which the ranks' parent has imported already.
    """
    from llada_megatron.data.tokenizer import check_vocabulary, load_tokenizer
    from llada_megatron.harness.asking import Wording

    at_least_one = ("max_new_tokens", "batch")
    for option in (*at_least_one, "max_forwards", "max_cached_tokens", "fewshot"):
        least = int(option in at_least_one)
        if (value := getattr(args, option)) is not None and value < least:
            raise BadInput(f"--{option.replace('_', '-')} {value}: give at least {least}.")
    if args.limit is not None and args.limit <= 0:
        raise BadInput(f"--limit {args.limit:g}: give a number of questions, or a share below 1.")
    if args.draws < 1 or (args.draws > 1 and args.draws % 2):
        raise BadInput(f"--draws {args.draws}: give 1 or an even number, as masks come in pairs.")
    config = generate.configuration(checkpoint, args.overrides)
    name = generate.tokenizer_of(checkpoint, config, args.overrides)
    if name is None:
        raise BadInput(f"Tasks are text: {generate.NO_TOKENIZER.removesuffix(', or give `tokens`')}.")
    check_vocabulary(name, config.model.vocab_size)
    tokenizer = load_tokenizer(name)
    encoder = generate.chat_encoder(args.chat_template, name, tokenizer) if args.chat else None
    ends = [tokenizer.end_of_document_id]
    if encoder:
        ends.append(encoder.end_of_answer([{"role": "user", "content": "."}]))
    has_likelihoods_alone = is_autoregressive(args, checkpoint) and args.rule != generate.NEXT_TOKENS
    way = (args.rule or "threshold", None, 0)
    rules, full, filled = way if has_likelihoods_alone else generate.way_of(args, checkpoint, config)
    block_size = filled if full is None else config.data.sequence_length
    wording = Wording(
        tokenizer,
        encoder,
        config.data.sequence_length,
        block_size,
        new_tokens=args.max_new_tokens,
        strings=args.stop,
    )
    settings = {key: value for key in generate.RULE_SETTINGS if (value := getattr(args, key)) is not None}
    job = dict(
        checkpoint=checkpoint.path,
        origin=opened.origin_of(args.checkpoint, checkpoint),
        block_size=block_size,
        filled_block=filled,
        full=full,
        rules=rules.split(","),
        settings={key: value.split(",") for key, value in settings.items()},
        tokenizer=name,
        end_tokens=[end for end in ends if end is not None],
        max_forwards=args.max_forwards,
        draws=args.draws,
        seed=args.seed,
        batch=args.batch,
        max_cached_tokens=args.max_cached_tokens,
        cuda_graphs=args.cuda_graphs,
        partial=None if args.json is None else args.json.with_name(f"{args.json.name}.partial"),
    )
    return config, wording, job


def is_autoregressive(args: argparse.Namespace, checkpoint: Checkpoint) -> bool:
    """Whether no stage of ours trained the weights, and nothing says a block size."""
    manifest = checkpoint.manifest
    fills_masks = generate.is_diffusion(manifest.lineage.get("architecture"))
    return not (manifest.block_size or args.block_size or fills_masks or args.full_attention)


def _on_this_rank(config: Config, job: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    from dataclasses import asdict

    from llada_megatron.evaluate.answers import EvaluationJob, answer

    answers, decodings = answer(config, EvaluationJob(**job))
    return answers, [asdict(each) for each in decodings]


def _file_of(path: Path, decoding: str) -> Path:
    return path.with_name(f"{path.stem}.{decoding}{path.suffix}") if decoding else path


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    said = results["llada"]
    console = Console(highlight=False)
    console.print(f"{said['checkpoint']}  {said['decoding']['name'] or 'likelihoods'}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for name in ("task", "metric", "value", "std. error", "questions"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, figures in {**results["results"], **results.get("groups", {})}.items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric}, {kind}"
            count = results["n-samples"].get(task, {}).get("effective", "")
            table.add_row(task, name, _number(value), _number(error), str(count))
    console.print(table)
    for task, cost in said["cost"].items():
        if "texts" in cost:
            console.print(
                f"{task}: {cost['tokens_per_forward']:.2f} tokens a forward, {cost['ms_per_forward']:.1f} ms"
                f" each, {cost['tokens_per_second']:.1f} tokens/s",
                style="dim",
                soft_wrap=True,
            )
        if cost.get("nats_se"):
            console.print(
                f"{task}: std. error of a likelihood over its masks {cost['nats_se']:.3f} nats",
                style="dim",
                soft_wrap=True,
            )


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float | int) else "-"
