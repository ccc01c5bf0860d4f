"""Golden traces of samplers for models in which every position sees every other: LLaDA's and Fast-dLLM's.

A forward says something of everything after the prompt, and the rule decides on one block of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from llada_megatron.config.ranges import Amount, Positive
from llada_megatron.generate.reference_loop import look
from llada_megatron.generate.rules import Change, Draws, Figures, Rule, Seen
from llada_megatron.generate.rules.filling import FactorRule, Quota, Threshold
from llada_megatron.generate.rules.sampling import Sampled, Sampling
from llada_megatron.generate.rules.seen import proposed
from llada_megatron.verify.golden_trace import DENOISE, Group, Settings, Trace


@dataclass(frozen=True)
class FastDLLM(Settings):
    """Of Fast-dLLM's `generate`: by factor, else by threshold, else by quota; 0 stands for none."""

    steps: Positive
    threshold: Amount = 0.0
    factor: Amount = 0.0


@dataclass(frozen=True)
class LLaDA(Settings):
    """Of LLaDA's `generate`."""

    steps: Positive
    temperature: Amount
    cfg_scale: Amount


def fast_dllm(trace: Trace, case: FastDLLM) -> np.ndarray:
    """Each block until it has no masks; the edge case of the factor rule is as the code has it."""
    starts = range(trace.prompt, len(trace.canvas.tokens), case.block_length)
    rule: Rule = Quota(1.0, max(case.steps // len(starts), 1))
    if case.factor or case.threshold:
        rule = FactorRule(case.factor, accepts_last=True) if case.factor else Threshold(case.threshold)
    for start in starts:
        step = 0
        while trace.masks(start, start + case.block_length):
            seen = trace.seen(trace.prompt, len(trace.canvas.tokens), rule.figures, step)
            _decide(trace, rule, seen, rule.read(seen, None)[0], start, case.block_length)
            step += 1
    return trace.canvas.tokens[trace.prompt :]


def llada(trace: Trace, case: LLaDA) -> np.ndarray:
    """Each block in steps // blocks forwards, of which each fills its quota.

    Draws are the stored ones: `rand` in the place of probabilities, `gumbel_uniform` to draw tokens.
    """
    starts = range(trace.prompt, len(trace.canvas.tokens), case.block_length)
    steps = max(case.steps // len(starts), 1)
    rule: Rule = Quota(1.0, steps)
    if case.temperature:
        rule = Sampled(rule, Sampling(case.temperature, plain_confidence=True))
    for start in starts:
        for step in range(steps):
            forward = len(trace.forwards)
            seen = trace.seen(trace.prompt, len(trace.canvas.tokens), Figures.logits, step)
            if case.cfg_scale:
                seen = _guided(trace, seen, case.cfg_scale)
            if case.temperature:
                uniform = trace.stored.needed("gumbel_uniform")
                seen = replace(seen, draws=Recorded(seed=0, uniform_mV=uniform[forward], first=trace.prompt))
            read, _ = rule.read(seen, None)
            if "rand" in trace.stored:
                read = replace(read, probability_m=trace.stored["rand"][forward].double().numpy())
            _decide(trace, rule, seen, read, start, case.block_length)
    return trace.canvas.tokens[trace.prompt :]


@dataclass(frozen=True, kw_only=True)
class Recorded(Draws):
    """The numbers that a sampler drew in one forward."""

    uniform_mV: Tensor
    first: int

    def uniform(self, position: int, step: int, count: int) -> np.ndarray:
        return self.uniform_mV[position - self.first, :count].double().numpy()


def _guided(trace: Trace, seen: Seen, scale: float) -> Seen:
    """Classifier-free guidance: without + (scale + 1) (with - without), where `without` is without prompt."""
    assert seen.logits_mV is not None
    tokens = trace.canvas.tokens.copy()
    tokens[: trace.prompt] = trace.canvas.mask_token_id
    canvas = replace(trace.canvas, tokens=tokens)
    without_mV = look(trace.golden.stage, canvas, trace.prompt, len(tokens), Figures.logits)["logits_mV"]
    logits_mV = without_mV + (scale + 1) * (seen.logits_mV - without_mV)
    choice_m, probability_m = proposed(logits_mV, seen.mask_token_id)
    return replace(seen, logits_mV=logits_mV, choice_m=choice_m, probability_m=probability_m)


def _decide(trace: Trace, rule: Rule, seen: Seen, read: Seen, start: int, length: int) -> None:
    """Let the rule decide on one block of what a forward said."""
    block = slice(start - seen.first, start - seen.first + length)
    arrays = ("tokens_m", "is_prompt_m", "is_masked_m", "choice_m", "probability_m")
    part = replace(read, **{name: getattr(read, name)[block] for name in arrays})
    tokens_m = seen.tokens_m.copy()
    tokens_m[block] = rule.decide(part, None).tokens_m
    trace.record(DENOISE, 0, read, Change(tokens_m, is_done=False), seen.is_masked_m)


def _other_cache(case: dict[str, Any]) -> str | None:
    cache = case.get("cache")
    return None if cache == "nocache" else f"cache {cache}"


GROUPS = {
    "fastdllm": Group(FastDLLM, fast_dllm, sees_all=True, unserved=_other_cache),
    "llada_generate": Group(LLaDA, llada, sees_all=True),
}
"""Of cases that are served: a cache that is no longer true is not."""
