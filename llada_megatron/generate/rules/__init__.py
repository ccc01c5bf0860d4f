"""Decoding rules: which tokens of a block change after a forward.

`seen.py` is the interface, `registry.py` names the rules; docs/decoding.md lists them with their sources.
"""

from llada_megatron.generate.rules.registry import RULES, rule_of, settings_of
from llada_megatron.generate.rules.seen import (
    Change,
    Draws,
    Figures,
    Rule,
    Seen,
    figures_of,
    label_probability,
)

__all__ = [
    "RULES",
    "Change",
    "Draws",
    "Figures",
    "Rule",
    "Seen",
    "figures_of",
    "label_probability",
    "rule_of",
    "settings_of",
]
