"""KEY=VALUE of a command line, each judged on its own: an error names it and says what to write instead."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, get_args, get_origin

from llada_megatron.config.errors import BadInput
from llada_megatron.config.ranges import hints_of, rules_of, takes_null
from llada_megatron.config.schema import Config

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

KIND = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
YES_OR_NO = ("true", "false", "yes", "no", "on", "off")


def check(overrides: Sequence[str], groups: Mapping[str, Sequence[str]]) -> None:
    """Raise BadInput for the first override that hydra would refuse, or take for something else.

    groups: of configs/, each with the names of its files.
    """
    for override in overrides:
        parsed = parse(override)
        key = str(parsed.key_or_group)
        if not key:
            raise BadInput(f"{override} has no key: write, for example, run.seed=2.")
        if parsed.is_delete():
            raise BadInput(f"{override} takes a setting away, and a run needs all of them: give it a value.")
        if re.match(r"hydra([./]|$)", key):
            raise BadInput(f"{override} is a setting of hydra, which only composes here: leave it out.")
        if parsed.is_sweep_override():
            raise BadInput(
                f"{override} gives several values: a list is written {key}=[a,b]; one run for each of them"
                " is started by `llada submit --multirun`."
            )
        if parsed.package is not None:
            raise BadInput(f"{override} names a package: write {key}={parsed.get_value_element_as_str()}.")
        value = parsed.value()
        if key in groups and not isinstance(value, dict):
            if value not in groups[key] and (key, value) != ("experiment", None):
                nearest = _nearest(str(value), groups[key])
                raise BadInput(
                    f"{override}: there is no such {key}{nearest}: choose from {', '.join(groups[key])}."
                )
        else:
            check_setting(override, key, value)
        if parsed.is_add() or (parsed.is_force_add() and key in groups):
            raise BadInput(f"{override}: {key} has a value already, leave out the +.")


def parse(override: str) -> Override:
    """An override as hydra reads it; BadInput that shows how to quote one that it cannot read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(override)
    except (
        HydraException,
        ValueError,
        RecursionError,
    ) as error:  # the last two for absurd numbers and depths
        key, sign, value = override.partition("=")
        if not sign or not re.fullmatch(r"\+{0,2}[A-Za-z_][\w./]*", key):
            item = re.sub(r"\[(\d+)\]", r".\1", key)
            example = f"{item}={value}" if item != key and sign else "run.seed=2"
            raise BadInput(f"{override} is no KEY=VALUE: write, for example, {example}.") from error
        if "${" in value:
            raise BadInput(
                f"{override} cannot be read: write another setting's value as ${{run.name}}."
            ) from error
        remedy = next(filter(_is_readable, _quoted_ways(key, value)), None)
        how = f"for example {shlex.quote(remedy)}" if remedy else "as in 'run.dir=\"/a/lr=0.1\"'"
        raise BadInput(f"{override} cannot be read: put its text in quotes, {how}.") from error


def _is_readable(override: str) -> bool:
    try:
        parse(override)
    except BadInput:
        return False
    return True


def _quoted_ways(key: str, value: str) -> Iterator[str]:
    """The override with quotes around what may need them: the texts of a list, or the whole value."""
    if re.search(r"""["'\\]""", value) is None:
        if listed := re.fullmatch(r"\[(.*)\]", value, re.DOTALL):
            texts = ",".join(f'"{text.strip()}"' for text in listed[1].split(","))
            yield f"{key}=[{texts}]"
        yield f'{key}="{value}"'
    else:
        escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)  # hydra: backslashes count where a quote follows them
        yield f'{key}="{escaped}"' if not value.endswith("\\") else f"{key}='{value}/'"


def check_setting(override: str, key: str, value: Any) -> None:
    """Raise BadInput, in the words of `override`, for a key that is none or a value of another type."""
    hint = _type_of(key)
    if hint is None:
        raise BadInput(f"{override}: {key} is no setting{_instead_of(key)}.")
    if (wanted := _wanted(hint, value)) is not None:
        raise BadInput(f"{override}: {key} takes {wanted}.")
    raw = override.partition("=")[2].strip()
    if rules_of(hint)[0] is str and not isinstance(value, str) and str(value) != raw:
        quoted = shlex.quote(f'{key}="{raw}"')
        raise BadInput(f"{override}: {key} is text, and this would be read as {value}: write {quoted}.")


def _type_of(key: str) -> Any:
    """The type of a setting, rules included; None where there is no such setting."""
    hint: Any = Config
    for part in re.split(r"[.\[\]]+", key.removesuffix("]")):
        bare, _ = rules_of(hint)
        if is_dataclass(bare):
            hint = hints_of(bare).get(part)  # type: ignore[arg-type]
        elif get_origin(bare) is list and part.isdecimal():
            (hint,) = get_args(bare)
        else:
            return None
    return hint


def _wanted(hint: Any, value: Any) -> str | None:
    """What a setting takes, where `value` is nothing of the kind."""
    if value is None and takes_null(hint):
        return None
    bare, _ = rules_of(hint)
    if isinstance(value, str) and "${" in value:  # of another setting, known when all are composed
        return None
    if get_origin(bare) is list:
        (element,) = get_args(bare)
        faults = [_wanted(element, item) for item in value] if isinstance(value, list) else ["a list"]
        wanted = next((fault for fault in faults if fault), None)
        return wanted and (
            f"a list such as [a,b], each {wanted}" if wanted != "a list" else "a list such as [a,b]"
        )
    if is_dataclass(bare):
        return _wanted_group(bare, value)
    if issubclass(bare, Enum):
        return None if value in list(bare) else f"one of {', '.join(bare)}"
    fits = {
        bool: isinstance(value, bool) or str(value).lower() in YES_OR_NO,
        int: not isinstance(value, bool | float) and _converts(int, value),
        float: not isinstance(value, bool) and _converts(float, value),
        str: isinstance(value, str | int | float),
    }
    return None if fits[bare] else KIND[bare]


def _wanted_group(group: Any, value: Any) -> str | None:
    names = {each.name for each in fields(group)}
    if not isinstance(value, dict):
        return f"settings of its own: {', '.join(sorted(names))}"
    for key, item in value.items():
        if key not in names:
            return f"no key {key}{_nearest(str(key), sorted(names))}: it has {', '.join(sorted(names))}"
        if wanted := _wanted(hints_of(group)[key], item):
            return f"as its {key} {wanted}"
    return None


def _converts(kind: type, value: Any) -> bool:
    try:
        kind(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _instead_of(key: str) -> str:
    """What a user may have meant by a key that is no setting, as a clause."""
    keys, last = settings(), key.rpartition(".")[2]
    if same := [each for each in keys if each.rpartition(".")[2] == last]:
        return f" (did you mean {' or '.join(same)}?)"
    if nearest := _nearest(key, keys):
        return nearest
    group = key.partition(".")[0]
    inside = [each for each in keys if each.startswith(f"{group}.")]
    return f": choose from {', '.join(inside or sorted({each.partition('.')[0] for each in keys}))}"


def _nearest(word: str, words: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, words, n=1, cutoff=0.8)
    return f" (did you mean {found[0]}?)" if found else ""


@cache
def settings() -> tuple[str, ...]:
    """Every dotted key that a run has, without those inside lists."""

    def keys(group: Any, prefix: str) -> Iterator[str]:
        for name, hint in hints_of(group).items():
            bare, _ = rules_of(hint)
            yield from keys(bare, f"{prefix}{name}.") if is_dataclass(bare) else [prefix + name]

    return tuple(keys(Config, ""))
