"""What a record means: one function per format, `--format NAME` of `llada data prepare`, listed in `FORMATS`.

Where records come from (lines, lists, parquet, compressed or not) is data/containers.py's.
"""

from __future__ import annotations

from collections.abc import Callable

from llada_megatron.data.containers import BadRecord, Record

Format = Callable[[Record, str], str]
"""(record, --text-field) -> the document; raises BadRecord. An empty one is skipped and counted."""


def text(record: Record, text_field: str) -> str:
    """Plain text is the document; of an object it is the field `text_field`."""
    if isinstance(record, str):
        return record
    if text_field not in record:
        fields = ", ".join(sorted(record)[:10]) or "none"
        raise BadRecord(f"has no field {text_field!r} (its fields: {fields}): set --text-field")
    if not isinstance(record[text_field], str):
        raise BadRecord(f"holds no text in the field {text_field!r}, but {_kind(record[text_field])}")
    return record[text_field]


FORMATS: dict[str, Format] = {"text": text}


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "true or false", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
