"""A sweep: `key=a,b` among the overrides becomes one run for each combination of values."""

from __future__ import annotations

import itertools
import re

from llada_megatron.config import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.config.overrides import parse


def sweep(overrides: list[str]) -> list[list[str]]:
    """One list of overrides for each combination of values `key=a,b`; run.name gets the values after it."""
    parsed = [parse(override) for override in overrides]
    ways = [
        [f"{text.split('=')[0]}={value}" for value in each.sweep_string_iterator()]
        if each.is_sweep_override()
        else [text]
        for text, each in zip(overrides, parsed, strict=True)
    ]
    named = next((each for each in overrides if each.startswith("run.name=")), None)
    if named and parsed[overrides.index(named)].is_sweep_override():
        raise BadInput(f"{named} gives several names: give one, each run gets its values after it.")
    base = named.removeprefix("run.name=") if named else compose.compose([way[0] for way in ways]).run.name
    runs = []
    for combination in itertools.product(*ways):
        chosen = [each for each, way in zip(combination, ways, strict=True) if len(way) > 1]
        suffix = "_".join(_suffix(*each.split("=", 1)) for each in chosen)
        rest = [each for each in combination if not each.startswith("run.name=")]
        runs.append([*rest, f"run.name={base}_{suffix}"] if chosen else list(combination))
    return runs


def _suffix(key: str, value: str) -> str:
    """`lr-0.001` of optimizer.lr: no sign in it means anything to hydra or a shell."""
    return re.sub(r"[^\w.+-]+", "-", f"{key.split('.')[-1]}-{value}")
