"""YAML of others that is what it looks like: no aliases that explode, no depth that a parser falls into."""

from __future__ import annotations

from pathlib import Path

import yaml

from llada_megatron.config.errors import BadInput
from llada_megatron.config.foreign import MAX_DEPTH, read_bytes

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where PyYAML was built with it: Python's own takes seconds for a line of brackets."""
MAX_VALUES = 100_000
"""Aliases written out; nine lines of them could make a billion values."""


def read_plain_yaml(path: Path, remedy: str) -> str:
    """The text of a YAML file of at most MAX_VALUES values, nested at most MAX_DEPTH deep.

    Raises BadInput, which ends with the `remedy`, where there is no such file, and for anything else in it;
    OSError where it cannot be read.
    """
    content = read_bytes(path, remedy)
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        fault = _fault(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fault = " ".join(str(error).split())
    if fault:
        raise BadInput(f"{path} is not YAML ({fault}): {remedy}.")
    return text


def _fault(text: str) -> str | None:
    sizes: dict[str, int] = {}  # of what has an anchor
    inside: list[tuple[str | None, int]] = [(None, 0)]  # anchor and size of what is open
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append((event.anchor, 0))
            if len(inside) > MAX_DEPTH + 1:
                return f"it is nested more than {MAX_DEPTH} deep"
            continue
        anchor, size = None, 0
        if isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                return f"*{event.anchor} stands for nothing before it"
            size = sizes[event.anchor]
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = inside.pop()
            size += 1
        if anchor is not None:
            sizes[anchor] = size
        inside[-1] = (inside[-1][0], inside[-1][1] + size)
        if inside[-1][1] > MAX_VALUES:
            return f"it holds more than {MAX_VALUES:,} values"
    return None
