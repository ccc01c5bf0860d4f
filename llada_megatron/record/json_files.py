"""JSON files that a user hands over, and those that a verb writes. Standard library only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llada_megatron.config.errors import BadInput, Refusal
from llada_megatron.config.foreign import parse_json, read_bytes


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises BadInput, which ends with the `remedy`, where there is no such file or it holds something else;
    OSError where it cannot be read.
    """
    try:
        content = parse_json(read_bytes(path, remedy))
    except Refusal:
        raise
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise BadInput(f"{path} is not JSON ({error}): {remedy}.") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds no JSON object: {remedy}.")
    return content


def require(content: dict[str, Any], path: Path, *keys: str, remedy: str) -> None:
    """Raises BadInput where a file's object lacks one of these keys."""
    for key in keys:
        if key not in content:
            raise BadInput(f"{path} has no '{key}': {remedy}.")


def write_json(path: Path | None, content: Any) -> None:
    """Write a file and the folders that it needs; nothing where no file was asked for."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_json_lines(path: Path, records: Iterable[Any]) -> None:
    """Write a line of JSON for each record, to a file that is there when it is whole; makes its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(record)}\n" for record in records)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
