"""What proves a conversion: every tensor of both sides accounted for, hashed, and read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llada_megatron.checkpoint.shards import Part
from llada_megatron.config.errors import BadInput
from llada_megatron.convert.safetensors_files import DTYPES, NAMES, as_bytes

CERTIFICATE = "certificate.json"
NAMES_SHOWN = 6
LOGITS_TOLERANCE = 1e-4
"""Largest difference over the largest logit: fp32 rounding stays far below, an error in a table far above."""


class Ledger:
    """The tensors of one side, as their parts pass by in order: SHA-256 of each, and what is wrong."""

    def __init__(self, side: str) -> None:
        self.problems: list[str] = []
        self._side = side
        self._seen: dict[str, tuple[Part, torch.dtype, int, Any]] = {}

    def record(self, part: Part, values: Tensor) -> None:
        """Note a part: the next one of its tensor, complete, and finite."""
        first, dtype, passed, digest = self._seen.get(part.name, (part, values.dtype, 0, hashlib.sha256()))
        if part.start != passed:
            self.problems.append(f"{self._side}: {part.name} has element {part.start} after {passed}")
        if tuple(values.shape) != part.size or part.shape != first.shape or values.dtype != dtype:
            self.problems.append(f"{self._side}: {part.name} got numbers of another shape or type")
        if not all(extreme.isfinite() for extreme in torch.aminmax(values)):  # either is NaN where one is
            self.problems.append(f"{self._side}: {part.name} holds what is not finite, or was never written")
        digest.update(as_bytes(values.contiguous()))
        self._seen[part.name] = (first, dtype, part.start + part.elements, digest)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name, of tensors that are complete."""
        return {
            name: first.shape
            for name, (first, _, passed, _) in self._seen.items()
            if passed == prod(first.shape)
        }

    def as_json(self) -> dict[str, dict[str, Any]]:
        """Type, shape and SHA-256 by name."""
        return {
            name: {"dtype": NAMES[dtype], "shape": first.shape, "sha256": digest.hexdigest()}
            for name, (first, dtype, _, digest) in self._seen.items()
        }


def tensors_digest(tensors: dict[str, Any]) -> str:
    """SHA-256 over the names and hashes of one side's tensors."""
    lines = [f"{name} {entry['sha256']}\n" for name, entry in sorted(tensors.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass
class Certificate:
    """The record beside a conversion's result; it passes when it names no problem."""

    direction: str
    source: str
    architecture: str
    mask_token_id: int | None = None
    expert_layout: str | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    """`written`, and `architecture`: what megatron-core's own model has."""
    logits: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    """Keys of the source's config.json that nothing reads."""
    notes: list[str] = field(default_factory=list)
    """What a user would not expect, one sentence each: what of config.json was left out, no tokenizer."""
    problems: list[str] = field(default_factory=list)
    megatron: dict[str, Any] = field(default_factory=dict)
    """Type, shape and SHA-256 of every tensor, by key."""
    hugging_face: dict[str, Any] = field(default_factory=dict)
    gguf: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.problems

    def require(self) -> None:
        """Raise BadInput with what is wrong, unless it passes."""
        if self.problems:
            raise BadInput(f"The conversion fails its certificate: {'; '.join(self.problems)}.")

    def compare(
        self, what: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
    ) -> None:
        """Note names and shapes that differ."""
        self._note(f"{what} lacks", expected.keys() - found.keys())
        self._note(f"{what} also holds", found.keys() - expected.keys())
        for name in sorted(found.keys() & expected.keys()):
            if found[name] != expected[name]:
                self.problems.append(
                    f"{name} is {list(found[name])} in {what}, it should be {list(expected[name])}"
                )

    def same_hashes(self, what: str, found: Ledger, expected: Ledger) -> None:
        """Note tensors of one ledger that differ from those of another."""
        ours, theirs = found.as_json(), expected.as_json()
        self._note(
            f"{what} has other numbers in", (name for name in theirs if ours.get(name) != theirs[name])
        )

    def count_parameters(self, written: int) -> None:
        """Note how many were written, and a difference to the architecture."""
        self.parameters["written"] = written
        if written != self.parameters["architecture"]:
            expected = self.parameters["architecture"]
            self.problems.append(f"{written:,} parameters were written, the architecture has {expected:,}")

    def compare_logits(self, found: dict[str, Any]) -> None:
        """Keep `max_difference` beside `max_logit`, and note a difference that rounding does not explain."""
        self.logits = found
        difference, largest = found["max_difference"], found["max_logit"]
        if not difference <= LOGITS_TOLERANCE * largest:
            self.problems.append(f"logits differ by {difference:.1e} where the largest is {largest:.1e}")

    def source_bytes(self) -> int:
        """Of the tensors that were converted, of an upcycling of those that were written."""
        sides = {"hf-to-mcore": self.hugging_face, "gguf-to-hf": self.gguf}
        side = sides.get(self.direction, self.megatron)
        return sum(prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize for entry in side.values())

    def rounded(self) -> bool:
        """Whether the two sides hold numbers of different types."""
        return {e["dtype"] for e in self.megatron.values()} != {
            e["dtype"] for e in self.hugging_face.values()
        }

    def _note(self, problem: str, names: Iterable[str]) -> None:
        if listed := sorted(names):
            more = f" and {len(listed) - NAMES_SHOWN} more" if len(listed) > NAMES_SHOWN else ""
            self.problems.append(f"{problem} {', '.join(listed[:NAMES_SHOWN])}{more}")

    def write(self, directory: Path) -> None:
        """Write certificate.json, one line per tensor."""
        tensors = ("megatron", "hugging_face", "gguf")
        head = {"passed": self.passed} | {k: v for k, v in vars(self).items() if k not in tensors}
        text = json.dumps(head, indent=1)[:-2]
        for side in (side for side in tensors if getattr(self, side)):
            lines = [
                f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in getattr(self, side).items()
            ]
            text += f',\n "{side}": {{\n' + ",\n".join(lines) + "\n }"
        (directory / CERTIFICATE).write_text(text + "\n}\n", encoding="utf-8")
