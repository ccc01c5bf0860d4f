"""Golden traces of samplers for models in which every position sees every other: LLaDA, Fast-dLLM, WINO.

Forwards are those of generate/full.py, with its caches and guidance. A forward says something of all rows
that it reads after the prompt, and the rule decides on one block of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from torch import Tensor

from llada_megatron.config.ranges import Amount, Positive, Share, one_of
from llada_megatron.generate.full import CACHES, FullAttention, FullDecoder
from llada_megatron.generate.prompt import Limits
from llada_megatron.generate.rules import Change, Draws, Rule, Seen, figures_of
from llada_megatron.generate.rules.filling import FactorRule, Quota, Threshold
from llada_megatron.generate.rules.remasking import DraftVerify
from llada_megatron.generate.rules.sampling import RandomOrder, Sampled, Sampling
from llada_megatron.verify.golden_trace import DENOISE, Group, Settings, Trace, padded, stored_table

CACHES_OF_CASES = {"nocache": "none", "prefix": "prefix", "dual": "dual"}


@dataclass(frozen=True)
class FastDLLM(Settings):
    """Of Fast-dLLM's `generate`: by factor, else by threshold, else by quota; 0 stands for none."""

    steps: Positive
    cache: Annotated[str, one_of(*CACHES_OF_CASES)]
    threshold: Amount = 0.0
    factor: Amount = 0.0


@dataclass(frozen=True)
class LLaDA(Settings):
    """Of LLaDA's `generate`."""

    steps: Positive
    temperature: Amount
    cfg_scale: Amount


def fast_dllm(trace: Trace, case: FastDLLM) -> np.ndarray:
    """Each block until it has no masks; the edge case of the factor rule is as the code has it.

    With a cache NVlabs' code, which has no factor, runs a block's second forward whether a mask is left or
    not.
    """
    starts = range(trace.prompt, len(trace.canvas.tokens), case.block_length)
    rule: Rule = Quota(1.0, max(case.steps // len(starts), 1))
    if case.factor or case.threshold:
        rule = FactorRule(case.factor, accepts_last=True) if case.factor else Threshold(case.threshold)
    forwards = Forwards(trace, rule, case.block_length, CACHES[CACHES_OF_CASES[case.cache]])
    least = 2 if case.cache != "nocache" and not case.factor else 1
    for start in starts:
        step = 0
        while trace.masks(start, start + case.block_length) or step < least:
            forwards.step(start, step)
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
    if "rand" in trace.stored:
        rule = RandomOrder(rule)
    forwards = Forwards(trace, rule, case.block_length, FullAttention(cfg_scale=case.cfg_scale))
    for start in starts:
        for step in range(steps):
            forwards.step(start, step)
    return trace.canvas.tokens[trace.prompt :]


@dataclass(frozen=True, kw_only=True)
class Recorded(Draws):
    """The numbers that a sampler drew in one forward, from position `first` on."""

    trace: Trace = field(repr=False)
    forward: int
    first: int

    def _stored(self, name: str, position: int) -> Tensor:
        return self.trace.stored.needed(name)[self.forward][position - self.first].double()

    def uniform(self, position: int, step: int, count: int) -> np.ndarray:
        return self._stored("gumbel_uniform", position)[:count].numpy()

    def order(self, position: int, step: int) -> float:
        return float(self._stored("rand", position))


class Forwards:
    """What the decoder for such models says of a trace's canvas, forward by forward."""

    def __init__(self, trace: Trace, rule: Rule, block_length: int, full: FullAttention) -> None:
        self.trace, self.rule, self.block_length = trace, rule, block_length
        self.decoder = FullDecoder(
            trace.golden.stage,
            rule,
            block_size=block_length,
            mask_token_id=trace.canvas.mask_token_id,
            context=len(trace.canvas.tokens),
            batch=1,
            full=full,
        )
        prompt, new_tokens = np.split(trace.canvas.tokens, [trace.prompt])
        self.running = self.decoder.check(0, prompt, Limits(len(new_tokens)))
        self.decoder.take_room(self.running)
        trace.canvas = replace(trace.canvas, tokens=self.running.tokens)

    def step(self, start: int, step: int) -> None:
        """One forward of the block that begins at `start`, and what the rule makes of it."""
        trace, stop = self.trace, start + self.block_length
        tokens, mask = trace.canvas.tokens, trace.canvas.mask_token_id
        fed = self.decoder.full.read(step, start, stop, len(tokens))
        first = max(fed.start, trace.prompt)
        output = self.decoder.look(self.running, fed, np.arange(first, fed.stop))
        tokens_m = tokens[first : fed.stop].copy()
        seen = Seen(
            tokens_m,
            np.zeros(len(tokens_m), bool),
            tokens_m == mask,
            **figures_of(self.rule.figures, output, mask),
            step=step,
            first=first,
            mask_token_id=mask,
            draws=Recorded(seed=0, trace=trace, forward=len(trace.forwards), first=trace.prompt),
            must_fill=True,
        )
        read, _ = self.rule.read(seen, None)
        block = slice(start - first, stop - first)
        arrays = ("tokens_m", "is_prompt_m", "is_masked_m", "choice_m", "probability_m")
        part = replace(read, **{name: getattr(read, name)[block] for name in arrays})
        changed_m = tokens_m.copy()
        changed_m[block] = self.rule.decide(part, None).tokens_m
        trace.record(DENOISE, fed.start, read, Change(changed_m, is_done=False), seen.is_masked_m)


@dataclass(frozen=True)
class WINO(Settings):
    """Of WINO's `decoding_wino`."""

    threshold: Share
    threshold_back: Share


@dataclass
class Verified(Trace):
    """A trace of WINO: with the probability of each token that stands by the shadow of its block."""

    verified: list[np.ndarray] = field(default_factory=list)
    """Per forward float64 [m]; -1 where a mask stands."""

    def differences(self, output: np.ndarray) -> dict[str, float]:
        """How far it is from the stored one; `confidence` is that of what is verified, too."""
        found = super().differences(output)
        ours, theirs = padded(self.verified), stored_table(self.stored, "verified", None)
        found["forwards"] += abs(len(ours) - len(theirs))
        F, W = (min(pair) for pair in zip(ours.shape, theirs.shape, strict=True))
        apart = np.abs(ours[:F, :W] - theirs[:F, :W]).max(initial=0.0)
        return found | {"confidence": max(found["confidence"], float(apart))}


@dataclass(frozen=True, kw_only=True)
class Noted(DraftVerify):
    """WINO's rule, each of whose forwards becomes one of the trace."""

    trace: Verified

    def decide(self, seen: Seen, state: int | None) -> Change:
        change, trace = super().decide(seen, state), self.trace
        trace.record(DENOISE, 0, seen, change, seen.is_masked_m)
        trace.forwards[-1][2] = len(trace.canvas.tokens)  # positions fed: all, beside the shadow
        assert seen.verified_m is not None
        trace.verified.append(np.where(seen.is_masked_m, -1.0, seen.verified_m))
        return change


def wino(trace: Verified, case: WINO) -> np.ndarray:
    """Each block until it has no masks, as the decoder for such models has it."""
    decoder = FullDecoder(
        trace.golden.stage,
        Noted(case.threshold, case.threshold_back, trace=trace),
        block_size=case.block_length,
        mask_token_id=trace.canvas.mask_token_id,
        context=len(trace.canvas.tokens),
        batch=1,
    )
    (result,) = decoder.results([trace.canvas.tokens[: trace.prompt]], Limits(case.gen_length))
    return result.tokens


def _other_cache(case: dict[str, Any]) -> str | None:
    cache = case.get("cache")
    return None if cache in CACHES_OF_CASES else f"cache {cache}"


GROUPS = {
    "fastdllm": Group(FastDLLM, fast_dllm, sees_all=True, unserved=_other_cache),
    "llada_generate": Group(LLaDA, llada, sees_all=True),
    "wino": Group(WINO, wino, sees_all=True, trace=Verified),
}
"""Of cases that are served."""
