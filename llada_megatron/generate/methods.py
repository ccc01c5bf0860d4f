"""Ways of decoding by name: a rule, how many blocks are active at a time, and how many branches are read.

Every rule is one, block by block without branches; others are a rule with other defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llada_megatron.config.errors import BadInput
from llada_megatron.config.ranges import check_values
from llada_megatron.generate.branches import ANCHOR_ALONE, Lookahead
from llada_megatron.generate.buffer import ONE_BLOCK, Buffer
from llada_megatron.generate.rules import RULES, Rule, rule_of
from llada_megatron.generate.rules import settings_of as settings_of_rule
from llada_megatron.generate.rules.registry import Setting, converted, settings_in


@dataclass(frozen=True)
class Method:
    """What a decoder is told beside its prompts."""

    rule: Rule
    buffer: Buffer = ONE_BLOCK
    lookahead: Lookahead = ANCHOR_ALONE


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "multibd": ("threshold", {"buffer": 4, "add_at": 0.1, "force_at": 0.9}),
    "d2f": ("threshold", {"threshold": 0.9, "buffer": 0, "add_at": 0.1, "force_at": 0.95}),
    "lopa": ("threshold", {"threshold": 0.9, "branches": 3}),
}
"""The rule of each name that is none, and its other defaults: the papers'."""
BESIDE_THE_RULE = {
    "buffer": (Buffer, "blocks"),
    "add_at": (Buffer, "add_at"),
    "force_at": (Buffer, "force_at"),
    "branches": (Lookahead, "branches"),
    "branch_entropy": (Lookahead, "by_entropy"),
    "branch_lowest": (Lookahead, "lowest"),
    "branch_memory": (Lookahead, "memory"),
}
"""Settings that every method has beside its rule's: whose field they are."""


def settings_of(name: str) -> dict[str, Setting]:
    """The settings of a method, those of its rule first; raises BadInput for a name that is none."""
    if name not in METHODS and name not in RULES:
        raise BadInput(f"There is no rule {name!r}: give {', '.join([*RULES, *METHODS])}.")
    rule, defaults = METHODS.get(name, (name, {}))
    beside = {key: settings_in(kind)[field] for key, (kind, field) in BESIDE_THE_RULE.items()}
    known = settings_of_rule(rule) | beside
    return known | {key: replace(known[key], default=default) for key, default in defaults.items()}


def method_of(
    name: str,
    settings: Mapping[str, Any] | None = None,
    of_checkpoint: Mapping[str, Any] | None = None,
) -> Method:
    """The method of a name with these settings, which may be text, the others being its defaults.

    of_checkpoint: as `rule_of` takes them.
    Raises BadInput for a method or a setting that is none, and for a value out of its range.
    """
    known = settings_of(name)
    rule, values = METHODS.get(name, (name, {}))
    values = {**values, **(settings or {})}
    for key in values:
        if key not in known:
            raise BadInput(f"Rule {name} has no setting {key}: give {', '.join(known)}.")
    fields: dict[type, dict[str, Any]] = {Buffer: {}, Lookahead: {}}
    for key, (kind, field) in BESIDE_THE_RULE.items():
        if key in values:
            value = converted(f"{key} of rule {name}", values.pop(key), known[key].kind)
            fields[kind][field] = value
    found = Method(
        rule_of(rule, values, of_checkpoint), Buffer(**fields[Buffer]), Lookahead(**fields[Lookahead])
    )
    check_values(found.buffer)
    check_values(found.lookahead)
    return found
