"""The verb `llada data`: prepare a corpus, write the demo's text, build indices beforehand, look inside."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy

from llada_megatron.config.errors import FAILED, BadInput
from llada_megatron.config.schema import DataConfig
from llada_megatron.data.chat import CONVERSATIONS
from llada_megatron.data.chat_template import BUILT_IN
from llada_megatron.data.containers import CONTAINERS
from llada_megatron.data.conversations import (
    ANSWER,
    ROLES,
    PackedConversations,
    check_roles,
    holds_conversations,
    read_roles,
)
from llada_megatron.data.corpus import CorpusIndex, read_index, read_sidecar
from llada_megatron.data.documents import MASK_RULES, Preparation
from llada_megatron.data.formats import FORMATS
from llada_megatron.data.prepare import prepare_corpus
from llada_megatron.data.tokenizer import Tokenizer, load_tokenizer

SHOWN_CHARACTERS = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `llada data`."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="files of text to .bin/.idx")
    add = prepare.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="files, folders or quoted patterns")
    add("--output", required=True, metavar="PREFIX")
    add("--overwrite", action="store_true", help="replace a corpus of that name")
    add("--tokenizer", default="bytes", help="`bytes` or a tokenizer.json")
    add("--end-of-document", metavar="TOKEN", help="default: found by name, such as <|endoftext|>")
    add("--parse-special", action="store_true", help="special tokens' names in the text become those tokens")
    add("--container", choices=CONTAINERS, help="what the files are; default: read from their content")
    add("--format", choices=[*FORMATS, *CONVERSATIONS], default="text", help="what a record means")
    add("--text-field", default="text", help="field of a record that holds the text")
    add("--chat-template", metavar="NAME", help=f"{', '.join(BUILT_IN)} or a file; default: the tokenizer's")
    add("--supervise", choices=("all", "last"), default="all", help="answers of a chat that are learnt")
    add("--skip-bad", type=int, default=0, metavar="N", help="go on without up to N unreadable records")
    add(
        "--mask-token-in-text",
        choices=MASK_RULES,
        default=MASK_RULES[0],
        help="of such a document; default drop",
    )
    add("--workers", type=int, help="processes; default: the cores this process may use")

    python_text = commands.add_parser("python-text", help="the text that CPython carries, prepared as bytes")
    python_text.add_argument("--output", type=Path, required=True, metavar="DIR")
    python_text.add_argument("--overwrite", action="store_true", help="replace the files there")

    index = commands.add_parser("index", help="build a run's indices beforehand, e.g. on a login node")
    index.add_argument("overrides", nargs="*", help="hydra overrides that name the run")

    inspect = commands.add_parser("inspect", help="counts, range of ids and first text of a corpus")
    inspect.add_argument("prefix", metavar="PREFIX")
    inspect.add_argument("--sequence-length", type=int, metavar="L", help="show how conversations would pack")
    inspect.add_argument("--pad-to", type=int, default=1, metavar="N", help="as data.pad_to")
    inspect.add_argument("--vocab-size", type=int, metavar="N", help="default: what the corpus's .json says")


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
    if args.skip_bad < 0:
        raise BadInput(f"--skip-bad must be at least 0, not {args.skip_bad}.")
    if os.path.basename(args.output) in ("", ".", ".."):
        raise BadInput(
            f"--output {args.output!r} names no corpus: give a folder and a name, such as data/notes."
        )
    how = Preparation(
        tokenizer=args.tokenizer,
        end_of_document=args.end_of_document,
        parse_special=args.parse_special,
        format=args.format,
        text_field=args.text_field,
        chat_template=args.chat_template,
        only_last=args.supervise == "last",
        mask_token_in_text=args.mask_token_in_text,
        skip_bad=args.skip_bad,
    )
    summary = prepare_corpus(
        args.input,
        Path(args.output),
        how,
        container=args.container,
        workers=args.workers,
        overwrite=args.overwrite,
        say=print,
    )
    _report(args.output, summary)
    return 0


def _python_text(args: argparse.Namespace) -> int:
    from llada_megatron.data.python_text import write_python_text

    text, prefix = args.output / "text.jsonl", args.output / "python"
    written = [text, *(Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx", "json"))]
    if not args.overwrite and (there := [path for path in written if path.exists()]):
        raise BadInput(f"{there[0]} exists already: choose another --output, or replace it by --overwrite.")
    documents = write_python_text(text)
    print(f"{text}: {documents} documents of Python {sys.version_info.major}.{sys.version_info.minor}")
    _report(prefix, prepare_corpus([text], prefix, overwrite=args.overwrite))
    return 0


def _report(prefix: str | Path, summary: dict[str, Any]) -> None:
    end = summary["end_of_document"]
    what = "conversations" if summary["format"] in CONVERSATIONS else "documents"
    after = (
        f"{summary['answer_tokens']} of them answers"
        if what == "conversations"
        else f"each document ends with {end}"
    )
    print(
        f"{prefix}: {summary['documents']} {what}, {summary['tokens']} tokens, {summary['bytes']} bytes of"
        f" text; {summary['empty_documents']} empty {what} skipped; {after}"
    )
    became = "became tokens" if summary["parse_special"] else "stayed text"
    rule = {"drop": "dropped", "split": "split there"}.get(summary["mask_token_in_text"])
    for count, what in [
        ("bad_records", "records could not be read and were left out"),
        ("special_strings", f"names of special tokens in the text {became}"),
        ("unknown_tokens", "tokens stand for text that the vocabulary does not hold"),
        ("documents_with_mask_token", f"documents held the mask token and were {rule}"),
        ("documents_with_replaced_characters", "documents held half a surrogate pair, now a `?`"),
    ]:
        if summary[count]:
            print(f"{summary[count]} {what}")


def _index(args: argparse.Namespace) -> int:
    from llada_megatron.config import rules
    from llada_megatron.config.compose import compose
    from llada_megatron.config.stage_settings import phases_of
    from llada_megatron.data.packed import build_sequences, held_out
    from llada_megatron.data.phases import PhasedData

    config = compose(args.overrides)
    schedule = rules.schedule_of(config)
    data = PhasedData(config, schedule)
    for phase in phases_of(config, schedule):
        sequences = data.at(phase.first_step)
        print(
            f"{phase.stages[0]}{' and on' if len(phase.stages) > 1 else ''}: sequences of"
            f" {phase.data.sequence_length}, {sequences.sequences_per_epoch} an epoch"
        )
        for domain, part in held_out(phase.data).items() if config.evaluation.block_sizes else ():
            sequences = build_sequences(
                part,
                split="validation",
                seed=config.run.seed,
                vocab_size=config.model.vocab_size,
                mask_token_id=config.model.mask_token_id,
            )
            print(f"  held out{domain and f' {domain}'}: {sequences.sequences_per_epoch}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from llada_megatron.data.token_ids import complaint, id_range, outside  # which import torch

    if args.vocab_size is not None and args.vocab_size < 1:
        raise BadInput(f"--vocab-size must be at least 1, not {args.vocab_size}.")
    index, sidecar = read_index(args.prefix), read_sidecar(args.prefix)
    documents = len(index.document_lengths)
    print(f"documents {documents}")
    print(f"tokens {index.tokens}")
    print(f"mean length {index.tokens / documents:.1f} tokens")
    print(f"as a log-normal: llada plan --document-tokens {index.log_normal}")
    lowest, highest = id_range(index) or (0, 0)
    print(f"ids {lowest} to {highest}")
    vocab_size = args.vocab_size or (sidecar["vocab_size"] if sidecar else max(highest, 0) + 1)
    # Ids between documents, where nobody reads, are no fault.
    found = outside(index, vocab_size) if lowest < 0 or highest >= vocab_size else None
    if found:
        print(f"{complaint(index, found, vocab_size)}.")
        return FAILED
    if holds_conversations(args.prefix):
        _print_conversations(args, index, sidecar)
    else:
        print(_first_text(args.prefix, index, sidecar))
    return 0


def _print_conversations(
    args: argparse.Namespace, index: CorpusIndex, sidecar: dict[str, Any] | None
) -> None:
    """How much is supervised, how they would pack, and the first one by its roles, answers in colour."""
    from rich.console import Console
    from rich.text import Text

    roles = numpy.memmap(f"{read_roles(index).prefix}.bin", numpy.uint8, "r")
    check_roles(roles, args.prefix)
    print(f"answers {int((roles >= ANSWER).sum())} tokens, {(roles >= ANSWER).mean():.1%}")
    shares = numpy.quantile(index.document_lengths, [0.5, 0.9, 0.99, 1])
    print("lengths {:.0f} (median), {:.0f} (90%), {:.0f} (99%), {:.0f} (longest) tokens".format(*shares))
    if args.sequence_length:
        data = DataConfig(sequence_length=args.sequence_length, pad_to=args.pad_to)
        packed = PackedConversations(index, numpy.arange(len(index.document_lengths)), data, seed=1)
        print(
            f"packed into {packed.sequences_per_epoch} sequences of {args.sequence_length}:"
            f" {packed.padding:.2%} padding, {packed.too_long} too long and left out"
        )
    tokenizer = _tokenizer(args.prefix, sidecar)
    if isinstance(tokenizer, str):
        print(f"ids instead of text: {tokenizer}")
    length = int(index.document_lengths[0])
    tokens = numpy.memmap(f"{args.prefix}.bin", index.dtype, "r")[:length].tolist()
    shown, start = Text(), 0
    for stop in range(1, length + 1):
        if stop == length or roles[stop] != roles[start]:
            role, part = int(roles[start]), tokens[start:stop]
            name = "answer" if role >= ANSWER else ROLES[role] or "other"
            shown.append(f"[{name}] ", style="dim")
            shown.append(
                str(part) if isinstance(tokenizer, str) else tokenizer.decode(part),
                "bold green" * (role >= ANSWER),
            )
            start = stop
    Console(highlight=False).print(shown, soft_wrap=True)


def _first_text(prefix: str, index: CorpusIndex, sidecar: dict[str, Any] | None) -> str:
    # Four tokens are enough for a character, even where tokens are bytes.
    first = numpy.memmap(f"{prefix}.bin", index.dtype, "r")[: 4 * SHOWN_CHARACTERS].tolist()
    tokens = f"first tokens {first[:32]}"
    tokenizer = _tokenizer(prefix, sidecar)
    if isinstance(tokenizer, str):
        return f"{tokens} ({tokenizer})"
    return tokenizer.decode([token for token in first if token >= 0])[:SHOWN_CHARACTERS]


def _tokenizer(prefix: str, sidecar: dict[str, Any] | None) -> Tokenizer | str:
    """The tokenizer that a corpus was prepared with, or why there is none."""
    if sidecar is None:
        return f"{prefix}.json is missing: the tokenizer is unknown"
    try:
        tokenizer = load_tokenizer(sidecar["tokenizer"])
    except BadInput as error:
        return str(error)
    if tokenizer.sha256 != sidecar["tokenizer_sha256"]:
        return f"{sidecar['tokenizer']} is another tokenizer than when it was prepared"
    return tokenizer
