"""The rules by name, and a rule from its name and settings as a command line or a configuration gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from llada_megatron.config.errors import BadInput
from llada_megatron.config.ranges import check_values, hints_of, rules_of
from llada_megatron.generate.rules.filling import Quota, Threshold
from llada_megatron.generate.rules.seen import Rule

RULES: dict[str, type] = {"threshold": Threshold, "quota": Quota}
"""Frozen dataclasses; see `Rule`."""


@dataclass(frozen=True)
class Setting:
    """One setting of a rule."""

    kind: type
    """bool, int, float or str."""
    default: Any


def settings_of(name: str) -> dict[str, Setting]:
    """The settings of a rule by name; raises BadInput for a rule that is none."""
    kind = _kind(name)
    hints = hints_of(kind)
    return {each.name: Setting(rules_of(hints[each.name])[0], each.default) for each in fields(kind)}


def rule_of(name: str, settings: Mapping[str, Any] | None = None) -> Rule:
    """The rule of a name with these settings, the others being its defaults.

    Values may be text. Raises BadInput for a rule or a setting that is none, and for a value out of its range.
    """
    known = settings_of(name)
    values = {}
    for key, value in (settings or {}).items():
        if key not in known:
            raise BadInput(f"Rule {name} has no setting {key}: give {' or '.join(known)}.")
        values[key] = _value(f"{key} of rule {name}", value, known[key].kind)
    rule = _kind(name)(**values)
    check_values(rule)
    return rule


def _kind(name: str) -> type:
    if name not in RULES:
        raise BadInput(f"There is no rule {name!r}: give {', '.join(RULES)}.")
    return RULES[name]


def _value(what: str, value: Any, kind: type) -> Any:
    if kind is bool:
        value = {"true": True, "false": False}.get(str(value).lower(), value)
        if isinstance(value, bool):
            return value
    elif not isinstance(value, bool):
        try:
            converted = kind(value)
        except (TypeError, ValueError, OverflowError):
            pass
        else:
            if isinstance(value, str) or converted == value:
                return converted
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    raise BadInput(f"{what} is {value!r}: give {wanted}.")
