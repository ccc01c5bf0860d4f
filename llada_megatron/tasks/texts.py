"""A user's held-out text, for likelihoods: bits per byte of documents, bits per character of text8."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.config.errors import BadInput
from llada_megatron.config.foreign import parse_json, read_bytes
from llada_megatron.tasks.data_packages import dataset

if TYPE_CHECKING:
    from datasets import Dataset

VARIABLE = "LLADA_EVAL_TEXT"
"""Of the environment: where the text is, unless a task's YAML says so."""
REMEDY = f"let {VARIABLE} be a .jsonl file with 'text' in each line, a .txt file, or a folder of those"
ALPHABET = frozenset("abcdefghijklmnopqrstuvwxyz ")
TEXT8_LENGTH, TEXT8_TEST = 100_000_000, 5_000_000


def documents(*, data: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The split `test`: each document of the user's text that is not empty; BadInput where there is none."""
    items = [{"text": text} for path in _files(data) for text in _texts(path) if text]
    if not items:
        raise BadInput(f"{_place(data)} holds no document: {REMEDY}.")
    return dataset(test=items)


def process_results(doc: dict[str, str], results: list[float]) -> dict[str, tuple[float, int]]:
    """(nats, how many) of a document's words and bytes, as lm-eval's own tasks count them.

    `bits_per_byte_stderr` follows `bits_per_byte`: lm-eval knows no error of it, and this fills the place.
    """
    (nats,) = results
    words, size = len(doc["text"].split()), len(doc["text"].encode())
    by_byte = (nats, size)
    return {
        "word_perplexity": (nats, max(words, 1)),
        "byte_perplexity": by_byte,
        "bits_per_byte": by_byte,
        "bits_per_byte_stderr": by_byte,
    }


def bits_per_byte_stderr(items: Sequence[tuple[float, int]]) -> float:
    """The standard error over documents of sum(bits) / sum(bytes), a ratio; NaN for one document.

    sqrt(n / (n - 1) sum (bits_i - r bytes_i)^2) / sum(bytes), with r the ratio (Cochran, Sampling Techniques,
    section 6.5).
    """
    if len(items) < 2:
        return math.nan
    bits = [-nats / math.log(2) for nats, _ in items]
    total = sum(size for _, size in items)
    ratio = sum(bits) / total
    spread = sum((bit - ratio * size) ** 2 for bit, (_, size) in zip(bits, items, strict=True))
    return math.sqrt(len(items) / (len(items) - 1) * spread) / total


def text8(*, data: str | None = None, length: int = 256, **_: Any) -> dict[str, Dataset]:
    """The split `test`: pieces of `length` characters, each scored alone; what is left at the end is dropped.

    Of text8 itself, 100 million characters, these are the last 5 million, its usual test part; of any other
    file all of it. Raises BadInput for other characters than a to z and the space.
    """
    paths = _files(data)
    if len(paths) != 1:
        raise BadInput(f"{_place(data)} holds {len(paths)} files: give the one of text8.")
    (text,) = _texts(paths[0])
    text = text.rstrip("\n")
    if strange := {*text} - ALPHABET:
        raise BadInput(
            f"{paths[0]} holds {min(strange)!r}: text8 is lower-case a to z and spaces, give such a text."
        )
    if len(text) == TEXT8_LENGTH:
        text = text[-TEXT8_TEST:]
    pieces = [text[at : at + length] for at in range(0, len(text) - length + 1, length)]
    if not pieces:
        raise BadInput(f"{paths[0]} has {len(text)} characters: a piece has {length}, give more text.")
    return dataset(test=[{"text": piece} for piece in pieces])


def bits_per_character(doc: dict[str, str], results: list[float]) -> dict[str, float]:
    """Bits per character of one piece; pieces are equally long, so the mean over them is that of the text."""
    return {"bits_per_character": -results[0] / (math.log(2) * len(doc["text"]))}


def _place(data: str | None) -> Path:
    place = data or os.environ.get(VARIABLE)
    if not place:
        raise BadInput(f"This task needs your text: {REMEDY}.")
    return Path(place)


def _files(data: str | None) -> list[Path]:
    place = _place(data)
    if not place.is_dir():
        return [place]
    return sorted(path for path in place.iterdir() if path.suffix in (".jsonl", ".txt"))


def _texts(path: Path) -> Iterator[str]:
    content = read_bytes(path, REMEDY)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text in UTF-8 ({error}): {REMEDY}.") from None
    if path.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = parse_json(line)
        except ValueError as error:
            raise BadInput(f"{path}, line {number}, is not JSON ({error}): {REMEDY}.") from None
        if not isinstance(document, dict) or not isinstance(document.get("text"), str):
            raise BadInput(f"{path}, line {number}, has no 'text': {REMEDY}.")
        yield document["text"]
