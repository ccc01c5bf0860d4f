"""What a setting may be: stated beside its meaning in schema.py, as part of its type; enforced here alone.

`steps: Count = 0` is `Annotated[int, Range(at_least=0)]`. A rule takes a value and returns what to give in
its place, or None where nothing is wrong. hydra and omegaconf see the bare type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from llada_megatron.config.errors import BadInput

Rule = Callable[[Any], str | None]
LARGEST: dict[type, float] = {int: 2**63 - 1, float: 1e30}
"""Of a number without a smaller limit: int64, and what fp32 holds with room to spare."""
LONGEST_NAME_BYTES = 255
"""Of a file's name, on every file system in use."""


@dataclass(frozen=True)
class Range:
    """A finite number between two limits; an upper one that is not given is LARGEST of the number's type."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __call__(self, number: Any) -> str | None:
        """None for a number inside, else the range in words."""
        largest = LARGEST[type(number)]
        inside = (
            math.isfinite(number)
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
            and number <= largest
        )
        return None if inside else f"a number {self._words(largest)}"

    def _words(self, largest: float) -> str:
        low = [("of at least", self.at_least), ("above", self.above)]
        high = [("at most", self.at_most), ("below", self.below)]
        lower = [f"{word} {limit:,g}" for word, limit in low if limit is not None]
        upper = [f"{word} {_plain(limit)}" for word, limit in high if limit is not None]
        return " and ".join([*lower, *(upper or [f"at most {_plain(largest)}"])])


def _plain(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def one_of(*choices: str) -> Rule:
    """A rule of text that is one of a few, where a StrEnum cannot name them all."""

    def rule(text: str) -> str | None:
        return None if text in choices else f"one of {', '.join(choice or '(empty)' for choice in choices)}"

    return rule


def text(value: str) -> str | None:
    """Characters that can be written and read again: no control characters, no broken Unicode."""
    return None if all(c.isprintable() or c.isspace() for c in value) and "\0" not in value else "plain text"


def path(value: str) -> str | None:
    """A path of the file system that names something."""
    return "a path" if not value.strip() else text(value) and "a path without control characters"


def name(value: str) -> str | None:
    """What becomes one folder's name: it cannot climb, hide, or look like an option."""
    if not value.isprintable() or value != value.strip() or not value or value[0] in "-." or "/" in value:
        return "a name that starts with a letter or digit and holds no `/` or control characters"
    if len(value.encode()) > LONGEST_NAME_BYTES:
        return f"a name of at most {LONGEST_NAME_BYTES} bytes"
    return None


def block_size(value: str) -> str | None:
    """`full`, or a number of tokens; whether it divides L is a rule of the schedule."""
    return None if re.fullmatch(r"full|0*[1-9][0-9]{0,17}", value) else "a number of tokens, or full"


def metric(value: str) -> str | None:
    """A figure of an evaluation (evaluate/likelihood.py: checkpoint_metrics)."""
    named = re.fullmatch(r"nll_ar|nll_block(full|[1-9][0-9]*)", value)
    return None if named else "nll_ar, or nll_block and a block size, for example nll_block32"


def span(value: str) -> str | None:
    """Numbers from one to another, both included."""
    return None if spans_of([value]) else "a number, or two with a dash between them, for example 4000-4095"


def spans_of(values: list[str]) -> list[range]:
    """What `span` accepts, as ranges; an empty one for anything else is left out."""
    found = [re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", value) for value in values]
    ranges = [range(int(each[1]), int(each[2] or each[1]) + 1) for each in found if each]
    return [each for each in ranges if each]


def shares(value: str) -> str | None:
    """Two shares, of documents for training and for validation."""
    return None if _shares(value) else "two shares, for example '99,1'"


def shares_of(value: str) -> tuple[float, float]:
    """The shares of data.split; BadInput for anything else."""
    if found := _shares(value):
        return found
    raise BadInput(f"data.split={value!r} will not do: give {shares(value)}.")


def _shares(value: str) -> tuple[float, float] | None:
    try:
        train, validation = (float(share) for share in value.split(","))
    except ValueError:
        return None
    return (train, validation) if min(train, validation) >= 0 and 0 < train + validation < math.inf else None


Count = Annotated[int, Range(at_least=0)]
Positive = Annotated[int, Range(at_least=1)]
Size = Annotated[int, Range(at_least=1, at_most=2**31 - 1)]
"""Of an axis of a tensor; kernels count in int32."""
Extent = Annotated[int, Range(at_least=0, at_most=2**31 - 1)]
Ways = Annotated[int, Range(at_least=1, at_most=2**20)]
"""Of a parallel axis: as many as there are processes at most."""
Factor = Annotated[float, Range(above=0)]
Decay = Annotated[float, Range(at_least=0, below=1)]
Seconds = Annotated[float, Range(at_least=0, at_most=1e9)]
Amount = Annotated[float, Range(at_least=0)]
"""Of a rate or a size; 0 where it is unknown."""
Share = Annotated[float, Range(at_least=0, at_most=1)]
Name = Annotated[str, name]
Path = Annotated[str, path]
Text = Annotated[str, text]


def check_values(settings: Any, prefix: str = "") -> None:
    """Raise BadInput, naming the setting, for the first value of a tree of dataclasses that its rule refuses.

    prefix: where the tree lies in a configuration, such as `model`; empty for a whole one.
    """
    for key, value, rules in leaves(settings, prefix):
        if rules and isinstance(value, list | dict):  # an empty one passes omegaconf's check of types
            raise BadInput(f"{key}={str(value)[:40]} will not do: give one value.")
        for rule in rules:
            if wanted := rule(value):
                if isinstance(value, str):
                    raise BadInput(f"{key}={_shortened(value)!r} will not do: give {wanted}.")
                raise BadInput(f"{key}={value} is out of range: give {wanted}.")


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, list[Rule]]]:
    """(dotted key, value, its rules) of each leaf of a tree of dataclasses; elements of a list are leaves."""
    kind: type = type(settings)
    hints = hints_of(kind)
    for each in fields(settings):
        key = f"{prefix}.{each.name}" if prefix else each.name
        yield from _leaves(key, getattr(settings, each.name), hints[each.name])


def _leaves(key: str, value: Any, hint: Any) -> Iterator[tuple[str, Any, list[Rule]]]:
    bare, rules = rules_of(hint)
    if is_dataclass(value):
        yield from leaves(value, key)
    elif get_origin(bare) is list:
        (element,) = get_args(bare)
        for index, item in enumerate(value):
            yield from _leaves(f"{key}[{index}]", item, element)
    else:
        yield key, value, rules


def rules_of(hint: Any) -> tuple[Any, list[Rule]]:
    """A type of the schema without its rules and without null, and they."""
    if takes_null(hint):
        (hint,) = (each for each in get_args(hint) if each is not NoneType)
    if get_origin(hint) is Annotated:
        bare, *rules = get_args(hint)
        return bare, rules
    return hint, []


def takes_null(hint: Any) -> bool:
    """Whether a setting may be left open: `bool | None`."""
    return isinstance(hint, UnionType)


@cache
def hints_of(settings: type) -> dict[str, Any]:
    """The types of a dataclass of the schema, rules included."""
    return get_type_hints(settings, include_extras=True)


def _shortened(value: str) -> str:
    return value if len(value) <= 80 else f"{value[:60]}...{value[-10:]}"
