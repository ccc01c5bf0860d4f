"""The verb `llada data`: prepare a corpus, write the demo's text, build indices beforehand, look inside."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy

from llada_megatron.config.errors import BadInput
from llada_megatron.data.prepare import prepare_corpus, read_index, read_sidecar
from llada_megatron.data.tokenizer import load_tokenizer

SHOWN_CHARACTERS = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `llada data`."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="text or JSONL to .bin/.idx")
    prepare.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE")
    prepare.add_argument("--output", type=Path, required=True, metavar="PREFIX")
    prepare.add_argument("--tokenizer", default="bytes", help="`bytes` or a tokenizer.json")
    prepare.add_argument("--text-field", default="text", help="field of a JSONL line that holds the text")
    prepare.add_argument("--workers", type=int, help="processes; default: the cores this process may use")

    python_text = commands.add_parser("python-text", help="the text that CPython carries, prepared as bytes")
    python_text.add_argument("--output", type=Path, required=True, metavar="DIR")

    index = commands.add_parser("index", help="build a run's indices beforehand, e.g. on a login node")
    index.add_argument("overrides", nargs="*", help="hydra overrides that name the run")

    inspect = commands.add_parser("inspect", help="counts and first text of a corpus")
    inspect.add_argument("prefix", metavar="PREFIX")


def run(args: argparse.Namespace) -> int:
    """Run a subcommand of `llada data` and return the exit code; raises BadInput for bad input."""
    return {
        "prepare": _prepare,
        "python-text": _python_text,
        "index": _index,
        "inspect": _inspect,
    }[args.data_command](args)


def _prepare(args: argparse.Namespace) -> int:
    if args.workers is not None and args.workers < 1:
        raise BadInput(f"--workers must be at least 1, not {args.workers}.")
    _report(
        args.output, prepare_corpus(args.input, args.output, args.tokenizer, args.text_field, args.workers)
    )
    return 0


def _python_text(args: argparse.Namespace) -> int:
    from llada_megatron.data.python_text import write_python_text

    text = args.output / "text.jsonl"
    documents = write_python_text(text)
    print(f"{text}: {documents} documents of Python {sys.version_info.major}.{sys.version_info.minor}")
    _report(args.output / "python", prepare_corpus([text], args.output / "python"))
    return 0


def _report(prefix: Path, summary: dict[str, Any]) -> None:
    print(
        f"{prefix}: {summary['documents']} documents, {summary['tokens']} tokens, {summary['bytes']} bytes "
        f"of text; {summary['empty_documents']} empty documents skipped"
    )


def _index(args: argparse.Namespace) -> int:
    from llada_megatron.config.compose import compose
    from llada_megatron.config.rules import schedule_of
    from llada_megatron.data.packed import build_sequences, held_out_sequences

    config = compose(args.overrides)
    wanted = {"train": schedule_of(config).total_tokens // config.data.sequence_length}
    if config.evaluation.block_sizes:
        wanted["validation"] = held_out_sequences(config.evaluation)
    for split, sequences_wanted in wanted.items():
        sequences = build_sequences(
            config.data,
            split=split,
            seed=config.run.seed,
            mask_token_id=config.model.mask_token_id,
            sequences_wanted=sequences_wanted,
        )
        print(f"{split}: {sequences.sequences_per_epoch} sequences an epoch, {sequences_wanted} wanted")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    index = read_index(args.prefix)
    documents = len(index.document_lengths)
    print(f"documents {documents}")
    print(f"tokens {index.tokens}")
    print(f"mean length {index.tokens / documents:.1f} tokens")
    print(f"as a log-normal: llada plan --document-tokens {index.log_normal}")
    tokens = numpy.memmap(f"{args.prefix}.bin", index.dtype, "r")
    # Four tokens are enough for a character, even where tokens are bytes.
    first = tokens[: 4 * SHOWN_CHARACTERS].tolist()
    sidecar = read_sidecar(args.prefix)
    if sidecar is None:
        print(f"first tokens {first[:32]} ({args.prefix}.json is missing: the tokenizer is unknown)")
    else:
        print(load_tokenizer(sidecar["tokenizer"]).decode(first)[:SHOWN_CHARACTERS])
    return 0
