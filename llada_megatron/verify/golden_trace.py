"""A trace of decoding: every forward that a sampler spends, and how far it is from a stored one.

Every forward computes the whole window, without a cache.

Legend: F forwards of a trace, W positions of its widest window, m positions of a block, T of the canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from llada_megatron.config.errors import BadInput
from llada_megatron.config.ranges import Positive
from llada_megatron.generate.reference_loop import Canvas, look
from llada_megatron.generate.rules import Change, Draws, Figures, Rule, Seen
from llada_megatron.verify.golden_cases import largest
from llada_megatron.verify.golden_set import REMEDY, Golden, Stored

DENOISE, PREFILL, STORE = 0, 1, 2
"""Kinds of forwards: of an unfinished block, of a prompt's whole blocks, of a finished block for its keys."""


@dataclass
class Trace:
    """A canvas that a sampler works on, and every forward that it spends."""

    golden: Golden
    stored: Stored
    """Its tensors."""
    canvas: Canvas
    prompt: int
    """Tokens of the prompt; block 0 begins at the canvas's start."""
    forwards: list[list[int]] = field(default_factory=list)
    """[kind, first position fed, positions fed, first of the window or -1, positions changed]"""
    before: list[np.ndarray] = field(default_factory=list)
    confidence: list[np.ndarray] = field(default_factory=list)
    choice: list[np.ndarray] = field(default_factory=list)
    """Per forward int64, float64 and int64 [m]; -1 where nothing could change, empty without a window."""
    changes: list[list[int]] = field(default_factory=list)
    """[forward, position, token]"""

    def blocks(self) -> list[tuple[int, int]]:
        """[start, end) of the blocks that are decoded: all but the prompt's whole ones."""
        first = self.prompt // self.canvas.block_size
        return self.canvas.blocks()[first:]

    def masks(self, start: int, end: int) -> int:
        """How many masks are left in a block."""
        return int((self.canvas.tokens[start:end] == self.canvas.mask_token_id).sum())

    def skip(self, kind: int, start: int, end: int) -> None:
        """A forward on [start, end) of which only keys and values are kept."""
        self.forwards.append([kind, start, end - start, -1, 0])
        for kept in (self.before, self.choice, self.confidence):
            kept.append(np.empty(0))

    def forward(
        self, kind: int, start: int, end: int, rule: Rule, step: int, state: Any, *, fed: int | None = None
    ) -> Change:
        """One forward of a block and what the rule makes of it; fed: its first position, else the block's."""
        seen = self.seen(start, end, rule.figures, step)
        read, state = rule.read(seen, state)
        change = rule.decide(read, state)
        fed = start if fed is None else fed
        self.record(kind, fed, read, change, ~seen.is_prompt_m if rule.edits else seen.is_masked_m)
        return change

    def seen(self, start: int, end: int, figures: Figures, step: int) -> Seen:
        """What a forward says of a block."""
        tokens_m = self.canvas.tokens[start:end].copy()
        is_prompt_m = np.arange(start, end) < self.prompt
        return Seen(
            tokens_m,
            is_prompt_m,
            (tokens_m == self.canvas.mask_token_id) & ~is_prompt_m,
            **look(self.golden.stage, self.canvas, start, end, figures),
            step=step,
            first=start,
            mask_token_id=self.canvas.mask_token_id,
            draws=Draws(seed=0),
            must_fill=True,
        )

    def record(self, kind: int, fed: int, read: Seen, change: Change, is_candidate_m: np.ndarray) -> None:
        """Write a forward down and its change into the canvas."""
        start, end = read.first, read.first + len(read.tokens_m)
        changed = np.flatnonzero(change.tokens_m != read.tokens_m)
        self.changes += [
            [len(self.forwards), start + int(at), int(change.tokens_m[at])] for at in changed.tolist()
        ]
        self.forwards.append([kind, fed, end - fed, start, len(changed)])
        self.before.append(read.tokens_m)
        self.confidence.append(np.where(is_candidate_m, read.probability_m, -1.0))
        self.choice.append(np.where(is_candidate_m, read.choice_m, -1))
        self.canvas.tokens[start:end] = change.tokens_m

    def differences(self, output: np.ndarray) -> dict[str, float]:
        """How far it is from the stored one: rows that differ in `forwards` and `tokens`; `confidence`."""
        ours = {
            "fwd": np.array(self.forwards).reshape(-1, 5),
            "acc": np.array(self.changes).reshape(-1, 3),
            "block_before": padded(self.before),
            "top1": padded(self.choice),
            "canvas": self.canvas.tokens[:, None],
            "output": output[:, None],
        }
        theirs = {name: stored_table(self.stored, name, value.shape[-1]) for name, value in ours.items()}
        conf, expected = padded(self.confidence), stored_table(self.stored, "conf", None)
        F, W = (min(pair) for pair in zip(conf.shape, expected.shape, strict=True))
        is_given_FW = (conf[:F, :W] >= 0) & (expected[:F, :W] >= 0)
        confidence = (conf[:F, :W] - expected[:F, :W])[is_given_FW]
        tokens = sum(rows_apart(ours[name], theirs[name]) for name in ours if name != "fwd")
        return {
            "forwards": float(rows_apart(ours["fwd"], theirs["fwd"])),
            "tokens": float(tokens),
            "confidence": largest(torch.from_numpy(confidence)) if confidence.size else 0.0,
        }


@dataclass(frozen=True)
class Settings:
    """What every case of a sampler says; fields have the names of cases.json."""

    block_length: Positive
    gen_length: Positive


@dataclass(frozen=True)
class Group:
    """The settings of a group's cases, and its sampler, which returns the answer, int64 [n]."""

    settings: type[Settings]
    run: Callable[[Any, Any], np.ndarray]
    sees_all: bool = False
    """Every position sees every other, blocks begin after the prompt, and the canvas ends with the answer."""
    unserved: Callable[[dict[str, Any]], str | None] = lambda case: None
    trace: type[Trace] = Trace
    """What it records."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What cases.json calls a field of the settings otherwise."""


def padded(rows: list[np.ndarray]) -> np.ndarray:
    """[F, W] of rows of several lengths, -1 after their ends."""
    width = max((len(row) for row in rows), default=0)
    return np.array([np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows]).reshape(
        len(rows), width
    )


def stored_table(stored: Stored, name: str, columns: int | None) -> np.ndarray:
    """A stored tensor as a table; what has one axis is a table of one column."""
    found = stored.needed(name)
    table = found[:, None] if found.dim() == 1 else found
    is_window = name in ("block_before", "top1", "conf", "verified")
    if table.dim() != 2 or not (is_window or table.shape[1] == columns):
        raise BadInput(
            f"cases.safetensors holds {name} of shape {list(found.shape)} in a trace of decoding: {REMEDY}."
        )
    return table.double().numpy()


def rows_apart(ours: np.ndarray, theirs: np.ndarray) -> int:
    """How many of the first axis differ or are missing on one side; inside, what only one has counts unless
    -1.
    """
    sizes = np.maximum(ours.shape, theirs.shape)[1:]
    ours, theirs = (
        np.pad(each, [(0, 0), *((0, n) for n in sizes - each.shape[1:])], constant_values=-1)
        for each in (ours, theirs)
    )
    common = min(len(ours), len(theirs))
    is_apart = (ours[:common] != theirs[:common]).any(axis=tuple(range(1, ours.ndim)))
    return int(is_apart.sum()) + abs(len(ours) - len(theirs))
