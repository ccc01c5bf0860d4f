"""Golden traces of samplers that decode several blocks at a time: D2F's, and LoPA's with its branches.

What is decided is `generate/running.py`'s. Their grid of blocks begins after the prompt, whose tokens all see
each other: here the prompt is brought to whole blocks by tokens in front, which no forward reads.

Legend: F forwards, R rounds, b branches of a round, T tokens of the longest one, N tokens filled.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.keys import KeyPool, PooledKeys, PoolPart
from llada_megatron.attention.mask import PerToken
from llada_megatron.config.ranges import Amount, Count, Positive, Share
from llada_megatron.generate.branches import Branch, Lookahead
from llada_megatron.generate.buffer import Buffer
from llada_megatron.generate.methods import Method
from llada_megatron.generate.prompt import Limits, Prompt
from llada_megatron.generate.reference_loop import forward, read
from llada_megatron.generate.rules import Change, Figures, Rule, Seen
from llada_megatron.generate.rules.filling import Threshold
from llada_megatron.generate.rules.seen import filled, log_probability
from llada_megatron.generate.running import Running
from llada_megatron.verify.golden_trace import (
    DENOISE,
    Group,
    Settings,
    Trace,
    padded,
    rows_apart,
    stored_table,
)

NONE = np.empty(0)
NO_BRANCH = -1.9
"""Above what stands in `branch_conf` for a branch that a round did not have."""


@dataclass(frozen=True)
class D2F(Settings):
    """Of D2F's `_generate_block_single`."""

    skip_threshold: Amount
    block_add_threshold: Share
    decoded_token_threshold: Share


@dataclass(frozen=True)
class LoPA(D2F):
    """Of LoPA's `_generate_enhanced_speculative` with verification, the anchor among the branches."""

    k: Count
    sampling_strategy: str
    branch_topp: Amount
    selection_conf_alpha: Share
    use_full_attention: bool = False
    """Every position sees every other, and what is kept is out of date."""


@dataclass(frozen=True, eq=False)
class PromptMask(BlockDiffusionMask):
    """Causal over blocks of which the first one is the prompt."""

    prompt: Positive = 1

    @cached_property
    def block_start(self) -> PerToken:
        place = np.arange(self.length)
        behind = place - (place - self.prompt) % self.block_size
        return np.where(place < self.prompt, 0, behind)[None]

    @cached_property
    def block_stop(self) -> PerToken:
        place = np.arange(self.length)
        stop = place - (place - self.prompt) % self.block_size + self.block_size
        return np.minimum(np.where(place < self.prompt, self.prompt, stop), self.length)[None]


class Session:
    """A sequence of ours whose positions, less `pad`, are the canvas's."""

    def __init__(self, trace: Trace, case: Settings, method: Method) -> None:
        self.trace, self.method, self.size = trace, method, case.block_length
        self.pad = -trace.prompt % self.size
        tokens = np.concatenate([np.zeros(self.pad, np.int64), trace.canvas.tokens[: trace.prompt]])
        self.running = Running(
            0,
            Prompt(tokens),
            Limits(new_tokens=case.gen_length),
            block_size=self.size,
            mask_token_id=trace.canvas.mask_token_id,
            context=len(tokens) + case.gen_length,
        )
        self.kept = self.pad
        """Before which the sampler has kept keys."""

    def outputs(self) -> list[np.ndarray]:
        """What one forward of each branch says of its masks, [n, C]."""
        return [self._read(number, branch) for number, branch in enumerate(self.running.branches)]

    def _read(self, number: int, branch: Branch) -> np.ndarray:
        stop = branch.stop - self.pad
        mask = PromptMask(
            [torch.tensor([0, stop])],
            min(self.size, stop),
            clean_copy=False,
            causal=True,
            prompt=self.trace.prompt,
        )
        rows = self.running.rows_read(branch, self.method.rule) - self.pad
        figures = self.method.lookahead.figures(self.method.rule.figures)
        tokens = branch.tokens[self.pad : branch.stop]
        return read(self.trace.golden.stage, tokens, mask, rows, figures, self.trace.canvas.mask_token_id)

    def step(self, outputs: list[np.ndarray]) -> bool:
        """Decide and go on; whether that was the last forward. `kept` is then what this forward has kept."""
        changed, _ = self.running.step(self.method, outputs, seed=0)
        result = self.running.ended(changed, self.method.rule, None)
        self.running.advance(self.method.buffer)
        self.kept = changed.first
        self.trace.canvas.tokens[:] = self.running.tokens[self.pad :]
        return result is not None


class Stale(Session):
    """A sequence in which every position sees every other: its keys stay as the branch that won read them.

    Each branch has places of its own. Forwards write those from `kept` on alone, so that what was kept at the
    places of any branch stays there.
    """

    def __init__(self, trace: Trace, case: LoPA, method: Method) -> None:
        super().__init__(trace, case, method)
        self._length = len(trace.canvas.tokens)
        self._pool = KeyPool((case.k + 2) * self._length)
        self._places = np.arange(self._length)

    def _read(self, number: int, branch: Branch) -> np.ndarray:
        stop, kept = branch.stop - self.pad, self.kept - self.pad
        places = np.append(self._places[:kept], number * self._length + np.arange(kept, stop))
        keys = PooledKeys(self._pool, [PoolPart(kept, places)], stop)
        rows = self.running.rows_read(branch, self.method.rule)
        return forward(
            self.trace.golden.stage,
            branch.tokens[self.kept : branch.stop],
            keys,
            keys.positions,
            rows - self.kept,
            branch.tokens[rows],
            self.method.lookahead.figures(self.method.rule.figures),
            self.trace.canvas.mask_token_id,
        )

    def step(self, outputs: list[np.ndarray]) -> bool:
        said, before = self.running.said(self.method, outputs), self.kept
        best = int(np.argmax(self.running.confidences(self.method.lookahead, said)))
        is_over = super().step(outputs)
        new = np.arange(before, self.kept) - self.pad
        self._places[new] = best * self._length + new
        return is_over


@dataclass
class Pipelined(Trace):
    """A trace whose forwards read all that is not kept."""

    extended: list[int] = field(default_factory=list)
    """Per forward how many positions it has added to the cache."""

    def differences(self, output: np.ndarray) -> dict[str, float]:
        """With `cache_extended_by` among the forwards."""
        found = super().differences(output)
        ours = np.array(self.extended)[:, None]
        found["forwards"] += rows_apart(ours, stored_table(self.stored, "cache_extended_by", 1))
        return found


def d2f(trace: Pipelined, case: D2F) -> np.ndarray:
    """Every block that has become active, until none has masks."""
    method = Method(
        Threshold(case.skip_threshold), Buffer(0, case.block_add_threshold, case.decoded_token_threshold)
    )
    session, is_over = Session(trace, case, method), False
    running, pad = session.running, session.pad
    while not is_over:
        kept, stop, rows = session.kept, running.anchor.stop, running.rows_read(running.anchor, method.rule)
        first, before = max(kept, pad + trace.prompt), running.tokens[:stop].copy()
        (output,) = session.outputs()
        (said,) = running.said(method, [output])
        choice, confidence = np.full(stop, -1), np.full(stop, -1.0)
        choice[rows], confidence[rows] = said["choice_m"], said["probability_m"]
        is_over = session.step([output])
        changed = np.flatnonzero(running.tokens[:stop] != before)
        trace.changes += [[len(trace.forwards), at - pad, int(running.tokens[at])] for at in changed.tolist()]
        trace.forwards.append([DENOISE, kept - pad, stop - kept, first - pad, len(changed)])
        trace.before.append(before[first:])
        trace.choice.append(choice[first:])
        trace.confidence.append(confidence[first:])
        trace.extended.append(session.kept - kept)
    return trace.canvas.tokens[trace.prompt :]


@dataclass
class Rounds(Trace):
    """A trace of LoPA."""

    records: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    """By the names of the stored tensors."""

    def differences(self, output: np.ndarray) -> dict[str, float]:
        """Rounds that differ in what was fed, and in what was read, chosen, filled; branches' confidence."""
        records = self.records
        b = max(len(texts) for texts in records["branch_x"])
        texts_RbT = padded([text for texts in records["branch_x"] for text in [*texts, *[NONE] * b][:b]])
        ours = {
            "branch_x": texts_RbT.reshape(-1, b, texts_RbT.shape[1]),
            "branch_is_anchor": padded(records["branch_is_anchor"]),
            "winner": np.array(records["winner"]),
            "filled": np.array(records["filled"]).reshape(-1, 3),
            "lookahead": np.array(records["lookahead"]).reshape(-1, 3),
            "output": output,
        }
        tokens = sum(
            rows_apart(each, self.stored.needed(name).double().numpy()) for name, each in ours.items()
        )
        fed = rows_apart(np.array(records["input"]), stored_table(self.stored, "input", 5))
        sure, expected = padded(records["branch_conf"]), self.stored.needed("branch_conf").double().numpy()
        R, b = (min(pair) for pair in zip(sure.shape, expected.shape, strict=True))
        apart = (sure[:R, :b] - expected[:R, :b])[expected[:R, :b] > NO_BRANCH]
        return {
            "forwards": float(fed),
            "tokens": float(tokens),
            "confidence": float(np.abs(apart).max(initial=0.0)),
        }


def lopa(trace: Rounds, case: LoPA) -> np.ndarray:
    """Rounds of one forward per branch. Where no mask is left to branch at, the anchor is there twice."""
    of_margin = case.sampling_strategy == "margin"
    lookahead = (Margins if of_margin else Lookahead)(
        case.k, case.sampling_strategy == "neg_entropy", case.branch_topp, case.selection_conf_alpha
    )
    rule = SureThreshold(case.skip_threshold, lookahead)
    buffer = Buffer(0, case.block_add_threshold, case.decoded_token_threshold)
    kind = Stale if case.use_full_attention else Session
    session, is_over = kind(trace, case, Method(rule, buffer, lookahead)), False
    running, pad, records = session.running, session.pad, trace.records
    for number in itertools.count():
        if is_over:
            return trace.canvas.tokens[trace.prompt :]
        branches, kept, shared = running.branches, session.kept, running.first
        outputs = session.outputs()
        sure = running.confidences(lookahead, running.said(session.method, outputs))
        best = int(np.argmax(sure))
        before, fed = branches[best].tokens.copy(), branches[-1].stop - kept
        records["branch_x"].append([branch.tokens[pad : branch.stop] for branch in branches])
        is_anchor = [np.array_equal(each.tokens, running.tokens) for each in branches]
        records["branch_is_anchor"].append(np.array(is_anchor, np.int64))
        is_over = session.step(outputs)
        records["branch_conf"].append(np.array(sure))
        records["winner"].append(best)
        records["input"].append([kept - pad, fed, shared - kept, shared - pad, len(branches)])
        records["filled"] += [
            [number, at - pad, int(running.tokens[at])]
            for at in np.flatnonzero(running.tokens != before).tolist()
        ]
        if case.k and not running.lookahead:
            running.lookahead = [Branch(running.tokens.copy(), list(running.anchor.blocks))]
            continue
        for branch in running.lookahead:
            (at,) = np.flatnonzero(branch.tokens != running.tokens).tolist()
            records["lookahead"].append([number, at - pad, int(branch.tokens[at])])
    raise AssertionError


@dataclass(frozen=True)
class Margins(Lookahead):
    """Confidence at a mask is how much the best probability is above the second: `margin`."""

    def figures(self, of_rule: Figures) -> Figures:
        return Figures.logits

    def sureness(self, figures: dict[str, np.ndarray]) -> np.ndarray:
        second_n, first_n = np.sort(np.exp(log_probability(figures["logits_mV"])), axis=-1)[:, -2:].T
        return first_n - second_n


@dataclass(frozen=True)
class SureThreshold(Rule):
    """`threshold`, whose choice where it is sure of none goes by the branches' confidence."""

    threshold: float
    lookahead: Lookahead

    @property
    def figures(self) -> Figures:
        return self.lookahead.figures(Figures.top_one)

    def decide(self, seen: Seen, state: Any) -> Change:
        masked_n = np.flatnonzero(seen.is_masked_m)
        accepted_k = masked_n[seen.probability_m[masked_n] > self.threshold]
        if not len(accepted_k) and len(masked_n) and seen.must_fill:
            figures = {name: each for name, each in vars(seen).items() if isinstance(each, np.ndarray)}
            accepted_k = masked_n[[self.lookahead.sureness(figures)[masked_n].argmax()]]
        return filled(seen, accepted_k)


GROUPS = {
    "d2f": Group(D2F, d2f, sees_all=True, trace=Pipelined),
    "lopa": Group(
        LoPA,
        lopa,
        sees_all=True,
        trace=Rounds,
        names={"block_size": "block_length", "max_new_tokens": "gen_length"},
    ),
}
"""Of cases that are served."""
