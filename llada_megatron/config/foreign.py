"""Files that others wrote: their bytes, and JSON in them, or an error of one line. Standard library only."""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from llada_megatron.config.errors import BadInput

MAX_DEPTH = 100
"""What reads a value walks it by recursion."""


def read_bytes(path: Path, remedy: str) -> bytes:
    """The content of a file; OSError where it cannot be read.

    Raises BadInput, which ends with the `remedy`, where there is none, and for a pipe or a device: it could
    keep a run waiting for ever, and a second rank would read something else.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{path} does not exist: {remedy}.") from None
    except ValueError:  # a zero byte
        raise BadInput(f"{str(path)!r} is not a path: {remedy}.") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise BadInput(f"{path} is no regular file: {remedy}.")
    return path.read_bytes()  # of a directory: IsADirectoryError


class RepeatedKey(ValueError):
    """Of a key that comes twice nobody knows which was meant."""


def parse_json(content: bytes | str) -> Any:
    """The value that JSON in UTF-8 holds; ValueError in one line for anything else, and for more depth.

    Text with half of a surrogate pair is refused, since it can neither be written nor tokenized.
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        value = json.loads(text, object_pairs_hook=distinct_keys)
        if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            raise RecursionError
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    except (json.JSONDecodeError, RepeatedKey):
        raise
    except ValueError:  # of int(), whose advice is not for users
        raise ValueError("a number in it has too many digits") from None
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text in it holds half of a surrogate pair") from None
    return value


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; RepeatedKey where a key comes twice, of which json.loads takes the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise RepeatedKey(f"{key!r} comes twice")
    return content


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return depth
