"""The rules by name, and a rule from its name and the settings that a user gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from llada_megatron.config.errors import BadInput
from llada_megatron.config.ranges import check_values, hints_of, rules_of
from llada_megatron.generate.rules.editing import JointThreshold, Soft
from llada_megatron.generate.rules.filling import (
    Autoregressive,
    Credit,
    EntropyBound,
    FactorRule,
    Hierarchical,
    Klass,
    Quota,
    Threshold,
)
from llada_megatron.generate.rules.insertion import InDel
from llada_megatron.generate.rules.remasking import Capped, DraftVerify, Rescaled, Unsure
from llada_megatron.generate.rules.sampling import RandomOrder, Sampled, Sampling
from llada_megatron.generate.rules.seen import Figures, Rule

RULES: dict[str, type[Rule]] = {
    "threshold": Threshold,
    "quota": Quota,
    "factor": FactorRule,
    "hierarchical": Hierarchical,
    "credit": Credit,
    "entropy": EntropyBound,
    "klass": Klass,
    "joint": JointThreshold,
    "indel": InDel,
    "soft": Soft,
    "remdm_cap": Capped,
    "remdm_rescale": Rescaled,
    "remdm_conf": Unsure,
    "wino": DraftVerify,
    "ar": Autoregressive,
}
"""Frozen dataclasses of their settings; a setting that several have is of one kind and meaning."""


@dataclass(frozen=True)
class Setting:
    """One setting of a rule."""

    kind: type
    """bool, int or float."""
    default: Any


def settings_of(name: str) -> dict[str, Setting]:
    """The settings of a rule, those of drawing tokens last; raises BadInput for a name that is none."""
    if name not in RULES:
        raise BadInput(f"There is no rule {name!r}: give {', '.join(RULES)}.")
    return settings_in(RULES[name]) | settings_in(Sampling)


def rule_of(
    name: str, settings: Mapping[str, Any] | None = None, of_checkpoint: Mapping[str, Any] | None = None
) -> Rule:
    """The rule of a name with these settings, the others being its defaults.

    of_checkpoint: what a model says itself, for a rule that has such a setting, where none is given.
    Values may be text. Raises BadInput for a rule or a setting that is none, and for a value out of its
    range.
    """
    known = settings_of(name)
    values = {}
    said = {key: value for key, value in (of_checkpoint or {}).items() if key in known}
    for key, value in {**said, **(settings or {})}.items():
        if key not in known:
            raise BadInput(f"Rule {name} has no setting {key}: give {', '.join(known)}.")
        values[key] = converted(f"{key} of rule {name}", value, known[key].kind)
    drawing = {key: values.pop(key) for key in settings_in(Sampling) if key in values}
    rule, sampling = RULES[name](**values), Sampling(**drawing)
    check_values(rule)
    check_values(sampling)
    if sampling.random_order and rule.figures is Figures.entropy:
        raise BadInput(
            f"Rule {name} goes by entropies: random_order=true needs one that goes by probabilities."
        )
    if sampling.temperature:
        rule = Sampled(rule, sampling)
    elif replace(sampling, random_order=False) != Sampling():
        idle = " and ".join(key for key in drawing if key not in ("temperature", "random_order"))
        raise BadInput(f"Nothing is drawn at temperature 0: give one above 0 with {idle}.")
    return RandomOrder(rule) if sampling.random_order else rule


def settings_in(kind: type) -> dict[str, Setting]:
    """The settings of a dataclass; one without a default has `dataclasses.MISSING`."""
    hints = hints_of(kind)
    return {each.name: Setting(rules_of(hints[each.name])[0], each.default) for each in fields(kind)}


def converted(what: str, value: Any, kind: type) -> Any:
    """A bool, int or float from text or a number; raises BadInput, which calls it `what`, for another one."""
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
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
    raise BadInput(f"{what} is {value!r}: give {wanted}.")
