"""A record becomes documents of tokens: the options of `llada data prepare`, and what they do to it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from llada_megatron.config.errors import BadInput
from llada_megatron.data.chat import ChatEncoder
from llada_megatron.data.chat_template import load_template
from llada_megatron.data.containers import BadRecord, Record
from llada_megatron.data.conversations import ANSWER
from llada_megatron.data.formats import FORMATS
from llada_megatron.data.tokenizer import Tokenizer, load_tokenizer

MASK_RULES = ("drop", "refuse", "split")

_tokenizer = functools.cache(load_tokenizer)  # once in each worker


@dataclass(frozen=True)
class Preparation:
    """How text becomes tokens; every field is an option of `llada data prepare`."""

    tokenizer: str = "bytes"
    """`bytes`, or the path of a tokenizer.json."""
    end_of_document: str | None = None
    """The token appended to every document; None: found by name."""
    parse_special: bool = False
    """Names of special tokens in the text become those tokens."""
    format: str = "text"
    """A name of data/formats.py's `FORMATS` or of data/chat.py's `CONVERSATIONS`."""
    text_field: str = "text"
    mask_token_in_text: str = "drop"
    """What becomes of a document that holds the mask token, one of `MASK_RULES`: it is dropped and counted,
    the preparation is refused, or it is split there into documents without it."""
    skip_bad: int = 0
    """Go on without up to this many records that cannot be read."""
    chat_template: str | None = None
    """Of conversations: as `load_template` takes it."""
    only_last: bool = False
    """Of conversations: supervise the last answer alone. A preference's earlier answers never are."""


@functools.cache
def _encoder(how: Preparation) -> ChatEncoder:
    tokenizer = _tokenizer(how.tokenizer, how.end_of_document)
    template = load_template(how.chat_template, how.tokenizer, tokenizer)
    only_last = how.only_last or how.format == "preference"
    return ChatEncoder(template, tokenizer, only_last=only_last, parse_special=how.parse_special)


Documents = Iterator[tuple[numpy.ndarray, numpy.ndarray]]
"""Ids int64 [n] and roles uint8 [n, or 0 where there are none] of each."""


def conversations(record: Record, place: str, how: Preparation, counts: Counter[str]) -> Documents:
    """The conversations of a record: one, or the two of a preference. Raises BadRecord for none."""
    encoder = _encoder(how)
    tokenizer = encoder.tokenizer
    try:
        written = str(record)
    except RecursionError:
        raise BadRecord("is nested too deep") from None
    made = encoder.conversations(record, how.format)
    if any(tokenizer.mask_token_id in ids for ids, _ in made):
        _refuse_mask(place, tokenizer, how, counts, "drop")
        return
    counts["special_strings"] += tokenizer.special_strings(written)
    for ids, roles in made:
        counts["bytes"] += len(tokenizer.decode(ids.tolist()).encode())
        counts["answer_tokens"] += int((roles >= ANSWER).sum())
        yield ids, roles


def documents(record: Record, place: str, how: Preparation, counts: Counter[str]) -> Documents:
    """The documents that a record of text makes: one, none if it is empty, several if it is split."""
    tokenizer = _tokenizer(how.tokenizer, how.end_of_document)
    text = FORMATS[how.format](record, how.text_field)
    # JSON may carry half of a surrogate pair, which no UTF-8 can hold.
    utf8 = text.encode(errors="replace")
    encoded = utf8.decode()
    ids = tokenizer.encode(encoded, how.parse_special) if text.strip() else []
    if not ids:
        counts["empty_documents"] += 1
        return
    parts = [ids]
    if tokenizer.mask_token_id in ids:
        _refuse_mask(place, tokenizer, how, counts, "drop or split")
        parts = _split(ids, tokenizer.mask_token_id) if how.mask_token_in_text == "split" else []
    if parts:
        counts["bytes"] += len(utf8)
        counts["documents_with_replaced_characters"] += encoded != text
        counts["special_strings"] += tokenizer.special_strings(encoded)
        if tokenizer.unknown_token_id is not None:
            counts["unknown_tokens"] += ids.count(tokenizer.unknown_token_id)
    for part in parts:
        yield numpy.array([*part, tokenizer.end_of_document_id]), numpy.zeros(0, numpy.uint8)


def _refuse_mask(
    place: str, tokenizer: Tokenizer, how: Preparation, counts: Counter[str], instead: str
) -> None:
    """Count a record that holds the mask token; raise BadInput where that is refused."""
    counts["documents_with_mask_token"] += 1
    if how.mask_token_in_text not in instead:
        raise BadInput(
            f"{place} contains the mask token (id {tokenizer.mask_token_id}), which no clean document may"
            f" hold: remove it, or set --mask-token-in-text to {instead}."
        )


def _split(ids: list[int], at: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == at:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if part]
