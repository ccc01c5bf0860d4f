"""Golden traces of decoding: what public samplers did, forward by forward, against this project's rules.

The rules are those of generate/rules; what a sampler does around them (where it stops, which forwards it
spends, what it returns) is replayed here, its oddities included: docs/decoding.md names them.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from llada_megatron.config.errors import BadInput
from llada_megatron.config.ranges import Amount, Count, Positive, check_values
from llada_megatron.generate.reference_loop import Canvas
from llada_megatron.generate.rules import Change, Figures, Rule, Seen
from llada_megatron.generate.rules.editing import JointThreshold
from llada_megatron.generate.rules.filling import Credit, Hierarchical, Quota, Threshold
from llada_megatron.generate.rules.registry import converted, settings_in
from llada_megatron.record.json_files import require
from llada_megatron.verify import golden_bidirectional, golden_pipelined
from llada_megatron.verify.golden_cases import CaseResult
from llada_megatron.verify.golden_set import REMEDY, Golden
from llada_megatron.verify.golden_trace import DENOISE, PREFILL, STORE, Group, Settings, Trace


@dataclass(frozen=True)
class Ending(Settings):
    """Of samplers that stop at an end of text."""

    eos_id: Count


@dataclass(frozen=True)
class Generate(Ending):
    """Of `generate` in LLaDA2's Hugging Face code."""

    steps: Positive
    threshold: Amount
    minimal_topk: Positive
    eos_early_stop: bool


@dataclass(frozen=True)
class Editing(Ending):
    """Of LLaDA2.1's sampler in dllm."""

    threshold: Amount
    editing_threshold: Amount
    max_post_steps: Count
    num_to_transfer: Positive
    eos_early_stop: bool


@dataclass(frozen=True)
class DInfer(Ending):
    """Of dInfer's `BlockDiffusionLLM`, or, without a cache, `BlockDiffusionLLMAttnmask`."""

    threshold: Amount
    kv_cache: bool
    early_stop: bool
    maximum_unroll: Positive
    expected_tpf: Positive


@dataclass(frozen=True)
class DInferHierarchy(DInfer):
    low_threshold: Amount


@dataclass(frozen=True)
class DInferCredit(DInfer):
    credit_alpha: Amount = 0.7
    boost_gamma: Amount = 0.2
    decay_beta: Amount = 0.8


@dataclass(frozen=True)
class SGLang(Ending):
    """Of SGLang's synchronous loop over one request; `algorithm_config` brings the rule's settings."""

    threshold: Amount = 0.95


@dataclass(frozen=True)
class SGLangJoint(SGLang):
    threshold: Amount = 0.5
    edit_threshold: Amount = 0.0
    max_post_edit_steps: Count = 16
    penalty_lambda: Amount = 0.0


RULES_OWN = "algorithm_config"
"""Of a case: the settings that SGLang hands to its rule."""


def generate(trace: Trace, case: Generate) -> np.ndarray:
    """Until a block holds an end; with early stop, as soon as one is filled in and no mask is before it.

    That stop looks for the end from the prompt's start, so one that stands in the prompt makes it return
    nothing. The canvas ends with the last block that was worked on. Returns the answer up to its first end.
    """
    tokens, steps = trace.canvas.tokens, min(case.steps, case.gen_length // case.minimal_topk)
    rule = Quota(case.threshold, steps)
    for start, end in trace.blocks():
        trace.canvas = replace(trace.canvas, tokens=tokens[:end])
        for step in range(steps):
            if not trace.masks(start, end):
                break
            before = tokens[start:end].copy()
            trace.forward(DENOISE, start, end, rule, step, None, fed=0)
            is_new_end = (tokens[start:end] == case.eos_id) & (before != case.eos_id)
            if case.eos_early_stop and is_new_end.any():
                at = int(np.flatnonzero(tokens == case.eos_id)[0])
                if not trace.masks(trace.prompt, at):
                    return tokens[trace.prompt : at + 1]
        if (tokens[trace.prompt : end] == case.eos_id).any():
            break
    return up_to(tokens[trace.prompt :][: case.gen_length], case.eos_id)


def edit(trace: Trace, case: Editing) -> np.ndarray:
    """Until, with early stop, a finished block holds an end; returns everything after the prompt."""
    rule = JointThreshold(
        case.threshold, case.editing_threshold, case.max_post_steps, at_least=case.num_to_transfer
    )
    for start, end in trace.blocks():
        state, step, is_done = None, 0, False
        while not is_done:
            change = trace.forward(DENOISE, start, end, rule, step, state, fed=0)
            state, step, is_done = change.state, step + 1, change.is_done
        if case.eos_early_stop and (trace.canvas.tokens[trace.prompt : end] == case.eos_id).any():
            break
    return trace.canvas.tokens[trace.prompt :]


def dinfer(rule: Rule, trace: Trace, case: DInfer) -> np.ndarray:
    """Forwards in groups that do not look whether a mask is left; returns the canvas without any end.

    A group has masks // expected_tpf forwards, at most maximum_unroll, but 2 at least. The keys of a block
    are stored by one forward more where its last one still read a mask. An end in a block, even in its part
    of the prompt, stops, but not with a cache and without early_stop; early_stop fills the rest with ends.
    """
    tokens = trace.canvas.tokens
    if (
        case.kv_cache
    ):  # a prompt of less than a block goes in with masks, which are replaced before they count
        trace.skip(PREFILL, 0, max(trace.prompt // case.block_length, 1) * case.block_length)
    for start, end in trace.blocks():
        state, step, read = None, 0, 0
        while masks := trace.masks(start, end):
            for _ in range(max(min(masks // case.expected_tpf, case.maximum_unroll), 2)):
                read = trace.masks(start, end)
                change = trace.forward(
                    DENOISE, start, end, rule, step, state, fed=None if case.kv_cache else 0
                )
                state, step = change.state, step + 1
        if case.kv_cache and read:
            trace.skip(STORE, start, end)
        if (tokens[start:end] == case.eos_id).any():
            if case.early_stop:
                tokens[end:] = case.eos_id
            if case.early_stop or not case.kv_cache:
                break
    return tokens[tokens != case.eos_id]


def sglang(rule: Rule, trace: Trace, case: SGLang) -> np.ndarray:
    """Each whole block of the prompt by itself, each other block until its keys are stored.

    A block is left when a forward changes nothing, and stored by one more, whose figures nobody penalises. An
    edited block that reaches its limit has one that changes nothing first. Returns the answer up to its first
    end.
    """
    for start, end in trace.canvas.blocks()[: trace.prompt // case.block_length]:
        trace.skip(PREFILL, start, end)
    for start, end in trace.blocks():
        state, step, is_done = None, 0, False
        while not is_done:
            change = trace.forward(DENOISE, start, end, rule, step, state)
            state, step, is_done = change.state, step + 1, change.is_done
        if rule.edits and trace.forwards[-1][-1]:
            trace.forward(DENOISE, start, end, Kept(rule, is_stored=False), step, state)
        trace.forward(STORE, start, end, Kept(rule, is_stored=True), step, state)
        if (trace.canvas.tokens[max(start, trace.prompt) : end] == case.eos_id).any():
            break
    return up_to(trace.canvas.tokens[trace.prompt :][: case.gen_length], case.eos_id)


@dataclass(frozen=True)
class Kept(Rule):
    """Changes nothing; reads what the rule does, or, when the block is stored, the model's own figures."""

    rule: Rule
    is_stored: bool

    @property
    def figures(self) -> Figures:
        return self.rule.figures

    @property
    def edits(self) -> bool:
        return self.rule.edits

    def read(self, seen: Seen, state: Any) -> tuple[Seen, Any]:
        return (seen, state) if self.is_stored else self.rule.read(seen, state)

    def decide(self, seen: Seen, state: Any) -> Change:
        return Change(seen.tokens_m.copy(), True, state)


def up_to(tokens: np.ndarray, end_id: int) -> np.ndarray:
    """The tokens up to the first end, with it."""
    ends = np.flatnonzero(tokens == end_id)
    return tokens[: ends[0] + 1] if len(ends) else tokens


def _joint(case: SGLangJoint) -> Rule:
    return JointThreshold(
        case.threshold, case.edit_threshold, case.max_post_edit_steps, penalty_lambda=case.penalty_lambda
    )


def _credit(case: DInferCredit) -> Rule:
    return Credit(case.threshold, case.credit_alpha, case.decay_beta, case.boost_gamma)


GROUPS: dict[str, Group] = {
    "hf_generate": Group(Generate, generate),
    "edit_llada21_sampler": Group(Editing, edit),
    "dinfer_threshold": Group(DInfer, lambda trace, case: dinfer(Threshold(case.threshold), trace, case)),
    "dinfer_hierarchy": Group(
        DInferHierarchy,
        lambda trace, case: dinfer(Hierarchical(case.threshold, case.low_threshold), trace, case),
    ),
    "dinfer_credit": Group(DInferCredit, lambda trace, case: dinfer(_credit(case), trace, case)),
    "sglang_low_confidence": Group(
        SGLang, lambda trace, case: sglang(Threshold(case.threshold), trace, case)
    ),
    "sglang_joint_threshold": Group(SGLangJoint, lambda trace, case: sglang(_joint(case), trace, case)),
    **golden_bidirectional.GROUPS,
    **golden_pipelined.GROUPS,
}
"""Of cases that are served."""


def check_case(golden: Golden, name: str, case: dict[str, Any]) -> CaseResult | str:
    """A trace of one of GROUPS against this project's code, or why it is not served.

    Raises BadInput where it lacks something that it cannot be replayed without.
    """
    group = GROUPS[case["group"]]
    if (reason := group.unserved(case)) is not None:
        return f"{name} ({reason})"
    if not isinstance(case.get(RULES_OWN, {}), dict):
        raise BadInput(f"cases.json/{name} has an {RULES_OWN} that is no object: {REMEDY}.")
    if unknown := case.get(RULES_OWN, {}).keys() - {each.name for each in fields(group.settings)}:
        return f"{name} ({RULES_OWN} {', '.join(sorted(unknown))})"
    case = {group.names.get(key, key): value for key, value in case.items()}
    settings = _settings(group.settings, name, case)
    stored, mask = golden.stored.under(name), golden.model.mask_token_id
    prompt = stored.ids("prompt", golden.model.vocab_size).numpy()
    T = len(prompt) + settings.gen_length
    if not group.sees_all:
        T = -(-T // settings.block_length) * settings.block_length
    tokens = np.concatenate([prompt, np.full(T - len(prompt), mask)])
    canvas = Canvas(tokens, T if group.sees_all else settings.block_length, mask)
    trace = group.trace(golden, stored, canvas, prompt=len(prompt))
    return CaseResult(name, trace.differences(group.run(trace, settings)))


def _settings(kind: type[Settings], name: str, case: dict[str, Any]) -> Settings:
    """What a case says for the fields of `kind`; those with a default may be missing."""
    where = Path("cases.json") / name
    given = {key: value for key, value in case.items() if value is not None} | case.get(RULES_OWN, {})
    known = settings_in(kind)
    require(given, where, *(key for key, each in known.items() if each.default is MISSING), remedy=REMEDY)
    values = {
        key: converted(f"{key} of case {name}", given[key], each.kind)
        for key, each in known.items()
        if key in given
    }
    settings = kind(**values)
    check_values(settings, name)
    return settings
