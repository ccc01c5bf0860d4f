"""Golden cases: stored inputs, outputs, losses and gradients of public reference code, against this code.

A directory holds cases (cases.json, cases.safetensors; described in the README.md beside them), and a Hugging
Face checkpoint (config.json, model.safetensors) unless another directory does, which is converted with its
certificate and loaded from there. Everything is computed in fp32.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llada_megatron.config.choices import Core
from llada_megatron.config.errors import BadInput
from llada_megatron.record.json_files import read_json, require
from llada_megatron.verify import golden_decode, golden_post
from llada_megatron.verify.golden_cases import (
    KINDS,
    TOLERANCES,
    CaseResult,
    forward_case,
    greedy_case,
    mask_case,
)
from llada_megatron.verify.golden_losses import (
    DENOMINATORS,
    WEIGHTS,
    loss_case,
    next_token_case,
    source_gradients,
)
from llada_megatron.verify.golden_set import REMEDY, Golden, load

__all__ = ["TOLERANCES", "CaseResult", "GoldenReport", "check"]

MASK_NAME = re.compile(r"n[1-9]\d{0,3}_bs[1-9]\d{0,3}")
SECTIONS = ("cases", "losses", "generation", "verification")
"""Of cases.json; others are listed."""


@dataclass
class GoldenReport:
    """Every case of a directory, and what it holds that this version does not serve or know."""

    cases: list[CaseResult] = field(default_factory=list)
    not_served: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Stored tensors, and sections of cases.json, that nothing reads."""
    derived: list[str] = field(default_factory=list)
    """Checked groups that are no public code's, and what they say they are."""

    @property
    def passed(self) -> bool:
        """Whether every case agrees, and there is one."""
        return bool(self.cases) and all(case.passed for case in self.cases)

    def worst(self) -> dict[str, float]:
        """The largest difference of each quantity over the cases."""
        found: dict[str, float] = {}
        for case in self.cases:
            for quantity, value in case.differences.items():
                found[quantity] = max(value, found.get(quantity, 0.0))
        return found


def check(directory: Path, checkpoint: Path | None = None, core: Core = Core.gpt) -> GoldenReport:
    """Run every case of a directory in this process, whose groups must hold one process.

    checkpoint: what the cases are of; None: the directory itself, or, where it holds none, the sibling
    `golden`. core: model.core of what is compared with them. A case is checked on what it stores; cases of a
    kind that is not served are listed and not counted. Raises BadInput when the directory lacks a file or its
    checkpoint cannot be read.
    """
    described = read_json(directory / "cases.json", REMEDY)
    require(described, directory / "cases.json", "mask_token_id", "cases", remedy=REMEDY)
    if type(described["mask_token_id"]) is not int:
        raise BadInput(f"{directory}/cases.json has a mask_token_id that is no number: {REMEDY}.")
    golden = load(directory, checkpoint or _checkpoint_of(directory), described["mask_token_id"], core)
    report = GoldenReport()
    for name in (name for name in golden.stored.under("maskfn") if MASK_NAME.fullmatch(name)):
        report.cases.append(mask_case(golden, name))
    left_out = [f"gen.{name}." for name in _section(described, "generation")]
    cases = _section(described, "cases")
    left_out += _grouped(golden, report, {name: case for name, case in cases.items() if "group" in case})
    for name, case in ((name, case) for name, case in cases.items() if "group" not in case):
        kind = case.get("kind", "none")
        if name == "greedy":
            report.cases.append(greedy_case(golden, name))
        elif kind in KINDS:
            report.cases.append(forward_case(golden, name, case))
        else:
            report.not_served.append(f"{name} (kind {kind})")
            left_out.append(f"{name}.")
        if kind in KINDS and "loss_next_token" in case:
            report.cases.append(next_token_case(golden, name, case))
    for name, loss in _section(described, "losses").items():
        if (reason := unserved_loss(loss)) is not None:
            report.not_served.append(f"{name}{reason}")
            left_out += [f"loss.{name}.", f"grad.{name}."]
        else:
            report.cases.append(loss_case(golden, name, loss))
    report.not_served += [f"generation {name}" for name in _section(described, "generation")]
    empty = [case for case in report.cases if not case.differences]
    report.not_served += [f"{case.name} (stores nothing that is compared)" for case in empty]
    report.cases = [case for case in report.cases if case.differences]
    report.unknown = unknown(golden, described, tuple(left_out))
    return report


def _checkpoint_of(directory: Path) -> Path:
    return directory if (directory / "config.json").is_file() else directory.resolve().parent / "golden"


def _grouped(golden: Golden, report: GoldenReport, cases: dict[str, dict[str, Any]]) -> list[str]:
    """Report cases of groups; returns the beginnings of the names of tensors that were left out."""
    left_out: list[str] = []
    unserved: Counter[str] = Counter()
    for name, case in cases.items():
        group = str(case["group"])
        result: CaseResult | str | None = None
        if group in golden_decode.GROUPS:
            result = golden_decode.check_case(golden, name, case)
        elif group in golden_post.GROUPS:
            result = golden_post.check_case(golden, name, case)
        if isinstance(result, CaseResult):
            report.cases.append(result)
            if group in golden_decode.GROUPS:
                continue  # all of public code; the README.md beside the cases names it
            source = f"{group}: {case.get('source', 'of unknown source')}"
            if case.get("source") != "reference code" and source not in report.derived:
                report.derived.append(source)
            continue
        left_out += [f"{name}.", f"{name.partition('_')[0]}."]  # its own, and what its group shares
        if result is None:
            unserved[group] += 1
        else:
            report.not_served.append(result)
    report.not_served += [f"group {group} (cases: {count})" for group, count in unserved.items()]
    return left_out


def unserved_loss(loss: dict[str, Any]) -> str | None:
    """Why a loss is not served, to be put after its name; None for one that is."""
    if not loss.get("same_token_labels", True):
        return ""
    for key, served in (("loss_norm_type", DENOMINATORS), ("loss_weight_type", WEIGHTS)):
        if ("loss_norm_type" in loss or key in loss) and loss.get(key) not in served:
            return f" ({key} {loss.get(key)})"
    return None


def unknown(golden: Golden, described: dict[str, Any], left_out: tuple[str, ...]) -> list[str]:
    """Tensors that no case looked at, without those of `left_out` cases; norms and sections of no meaning."""
    looked_at = golden.stored.looked_at
    sections = [name for name, value in described.items() if isinstance(value, dict) and name not in SECTIONS]
    parameters = source_gradients(golden)
    norms = [
        f"grad_norms of {key} in {name}"
        for name, loss in _section(described, "losses").items()
        if f"loss.{name}." not in left_out
        for key in loss.get("grad_norms", {})
        if key not in parameters
    ]
    tensors = [name for name in golden.stored if name not in looked_at and not name.startswith(left_out)]
    return sorted(tensors) + norms + [f"section {name} of cases.json" for name in sections]


def _section(described: dict[str, Any], name: str) -> dict[str, Any]:
    section = described.get(name, {})
    if not isinstance(section, dict) or not all(isinstance(value, dict) for value in section.values()):
        raise BadInput(f"cases.json has a section '{name}' that is no object of objects: {REMEDY}.")
    return section
