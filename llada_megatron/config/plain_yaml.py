"""YAML of others that is what it looks like: no aliases that grow, no depth that a parser falls into."""

from __future__ import annotations

from pathlib import Path

import yaml

from llada_megatron.config.errors import BadInput
from llada_megatron.config.foreign import MAX_DEPTH, read_bytes


def read_plain_yaml(path: Path, remedy: str) -> str:
    """The text of a YAML file without aliases, nested at most MAX_DEPTH deep.

    Nine lines of aliases make a billion values. Raises BadInput, which ends with the `remedy`, where there is
    no such file, and for anything else in it; OSError where it cannot be read.
    """
    depth, content = 0, read_bytes(path, remedy)
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or isinstance(event, yaml.AliasEvent):
                fault = "has an alias" if depth <= MAX_DEPTH else f"is nested more than {MAX_DEPTH} deep"
                raise BadInput(f"{path} {fault}, which no configuration of a run has: {remedy}.")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not YAML ({' '.join(str(error).split())}): {remedy}.") from None
    return text
