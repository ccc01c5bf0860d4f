"""Decoding rules that fill masks, on one block, by hand; what all rules promise; their names and settings."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.generate.rules import RULES, Draws, Figures, figures_of, rule_of, settings_of
from llada_megatron.generate.rules.sampling import Sampling
from llada_megatron.parallel import groups
from llada_megatron.parallel.random import Purpose, generator
from tests.generate.rule_blocks import (
    DELETE,
    MASK,
    SPLIT,
    VOCABULARY,
    decoded,
    filled,
    logits_of,
    noisy,
    seen_logits,
    seen_of,
    text_of,
)


@pytest.mark.parametrize(
    ("name", "settings", "text", "probability", "after"),
    [
        ("threshold", {"threshold": 0.5}, "9|____", [0, 0.6, 0.5, 0.4, 0.7], "91__4"),  # exactly at it: not
        ("threshold", {"threshold": 0.9}, "9|____", [1, 0.3, 0.5, 0.5, 0.2], "9_2__"),  # a tie: the first
        ("threshold", {"threshold": 0.1}, "____", [0.2, 0.3, 0.4, 0.5], "0123"),
        ("threshold", {"threshold": 0}, "____", [0, 0, 0, 0], "0___"),
        ("threshold", {"threshold": 1}, "____", [1, 1, 0, 0], "0___"),
        ("quota", {"threshold": 0.5, "steps": 2}, "____", [0.6, 0.2, 0.3, 0.1], "0_2_"),  # the best 2
        ("quota", {"threshold": 0.5, "steps": 2}, "____", [0.6, 0.7, 0.8, 0.1], "012_"),
        ("quota", {"threshold": 0.5, "steps": 1}, "____", [0.1, 0.1, 0.1, 0.1], "0123"),
        ("quota", {"threshold": 0.5}, "____", [0.1, 0.2, 0.2, 0.1], "_1__"),
        ("factor", {}, "____", [0.2, 0.7, 0.6, 0.1], "_1__"),  # the second needs 1 - 1/3
        ("factor", {}, "____", [0.9, 0.67, 0.755, 0.76], "0_23"),  # 1 - 1/3, 1 - 1/4, 1 - 1/5
        ("factor", {"accepts_last": True}, "____", [0.9, 0.67, 0.77, 0.76], "0123"),  # the last fails alone
        ("factor", {"accepts_last": True}, "____", [0.9, 0.67, 0.74, 0.73], "0_2_"),
        ("factor", {"accepts_last": True}, "12|__", [0, 0, 0.3, 0.2], "1223"),  # of two the second
        ("factor", {"factor": 4}, "____", [0, 0, 0, 0], "012_"),  # 1 - 4/5 for the fourth
        ("factor", {}, "123|_", [0, 0, 0, 0], "1233"),
        ("hierarchical", {}, "__5__", [0.5, 0.6, 0, 0.3, 0.35], "_15__"),  # the second best is below low
        ("hierarchical", {}, "__5__", [0.5, 0.5, 0, 0.41, 0.4], "0153_"),  # equal ones of a run
        ("hierarchical", {}, "__5__", [0.1, 0.2, 0, 0.3, 0.3], "__53_"),  # the best of all, the first one
        ("hierarchical", {"threshold": 0.5}, "____", [0.6, 0.7, 0.5, 0.8], "01_3"),
    ],
)  # fmt: skip
def test_a_rule_fills(name, settings, text, probability, after):
    assert filled(name, text, probability, settings) == after


def test_a_quota_falls_to_the_first_forwards():
    rule = rule_of("quota", {"threshold": 1, "steps": 3})
    texts = [text_of(rule.step(seen_of("_" * 8, np.linspace(0, 1, 8), step=step), None)) for step in range(4)]
    counts = [8 - text.count("_") for text in texts]
    assert counts == [3, 3, 2, 2]


@pytest.mark.parametrize(
    ("bound", "entropies", "after"),
    [
        (0.1, [0.06, 0.05, 2.0, 0.07], "01__"),  # 0.05, then 0.11 is too much for a third
        (0.11, [0.06, 0.05, 2.0, 0.07], "01_3"),  # exactly at the bound
        (0, [0.5, 0.4, 0.5, 0.5], "_1__"),
        (100, [0.5, 0.4, 0.5, 0.5], "0123"),
    ],
)
def test_entropy_is_spent_up_to_a_bound(bound, entropies, after):
    seen = seen_of("____", entropy_m=np.array(entropies))
    assert text_of(rule_of("entropy", {"entropy_bound": bound}).step(seen, None)) == after


def dense_credit(logits, memory, is_masked, alpha, beta, gamma):
    """M and the logits with its credit, as published."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    memory = memory * beta
    rows = np.arange(len(p))
    memory[rows, p.argmax(-1)] += p.max(-1) ** gamma * is_masked
    return memory, logits + alpha * np.log1p(memory)


def test_credit_equals_the_published_matrix_over_many_forwards():
    rule = rule_of("credit", {"threshold": 1})
    random, state, memory, text = np.random.default_rng(1), None, np.zeros((6, VOCABULARY)), "3|_____"
    for _ in range(7):
        logits = random.normal(size=(6, VOCABULARY)) * 2
        logits[:, MASK] = -20
        seen = seen_logits(text, logits)
        memory, fused = dense_credit(logits, memory, seen.is_masked_m, 0.7, 0.8, 0.2)
        read, state = rule.read(seen, state)
        np.testing.assert_allclose(read.logits_mV, fused, atol=1e-5)
        np.testing.assert_array_equal(read.choice_m, fused.argmax(-1))
        p = np.exp(fused) / np.exp(fused).sum(-1, keepdims=True)
        np.testing.assert_allclose(read.probability_m, p.max(-1), atol=1e-5)
        text = "3|" + text_of(rule.decide(read, state))[1:]


def test_klass_waits_until_what_it_is_sure_of_stays():
    rule = rule_of("klass", {"threshold": 0.8, "steps": 8})
    steady, moving = [0, 1, 2, 3], [4, 5, 6, 7]
    sure = logits_of(steady, steady, moving, moving)
    state, texts = None, []
    for step in range(3):
        now = sure.copy()
        now[2:] = np.roll(now[2:], step, axis=-1)  # another token each time
        now[0] *= 0.01 if step == 0 else 1  # unsure at first
        change = rule.step(seen_logits("____", now * 3, step=step), state)
        state = change.state
        texts.append(text_of(change))
    # Without any that is ready, one of the quota, the most probable; at the third forward position 1 has two
    # small divergences, position 0 one.
    assert texts == ["_0__", "0___", "_0__"]


def test_klass_forgets_a_divergence_after_its_history():
    rule = rule_of("klass", {"threshold": 0.5, "kl_history": 1, "kl_threshold": 1e-3})
    logits = logits_of([1], [2], [3])
    first = rule.step(seen_logits("___", logits), None)
    second = rule.step(seen_logits("___", logits, step=1), first.state)
    assert text_of(first) == "1__" and text_of(second) == "123" and second.is_done


EDITING = ("joint", "indel", "soft", "remdm_cap", "remdm_rescale", "remdm_conf", "wino")
FILLING = [name for name in RULES if name not in EDITING]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.8, "top_k": 12, "top_p": 0.9}], ids=["best", "drawn"]
)
@pytest.mark.parametrize("text", ["________", "123|_____", "1234567|_"])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_what_is_given_and_ends_with_tokens_alone(name, text, settings):
    for seed in range(4):
        found = decoded(name, text, noisy(seed, 8), settings)
        for seen, change in found:
            np.testing.assert_array_equal(change.tokens_m[seen.is_prompt_m], seen.tokens_m[seen.is_prompt_m])
            assert change.tokens_m is not seen.tokens_m and change.tokens_m.dtype == np.int64
            assert change.changes(seen) == (change.tokens_m != seen.tokens_m).any()
            if name in FILLING:
                assert (change.tokens_m[~seen.is_masked_m] == seen.tokens_m[~seen.is_masked_m]).all()
                assert change.changes(seen) and change.is_done == (change.tokens_m != MASK).all()
        assert (found[-1][1].tokens_m != MASK).all()
        assert not np.isin(found[-1][1].tokens_m, [DELETE, SPLIT]).any() or name != "indel"


@pytest.mark.parametrize("name", RULES)
def test_what_may_change_tokens_says_so(name):
    assert rule_of(name).edits is (name in EDITING)
    for settings in ({}, {"temperature": 1.0}, {"random_order": True} if name != "entropy" else {}):
        assert rule_of(name, settings).verifies is (name == "wino")


@pytest.mark.parametrize("name", RULES)
def test_a_block_without_masks_is_done_and_stays(name):
    logits = logits_of([1, 2], [2, 3], [3, 4], [4, 5])
    ((seen, change),) = decoded(name, "1|234", lambda step: logits)
    assert not change.changes(seen)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_a_function_of_what_it_is_given(name):
    settings = {"temperature": 1.0}
    once, again = (
        decoded(name, "12|______", noisy(3, 8, scale=0.5), settings, seed=5, prompt=7) for _ in range(2)
    )
    assert [text_of(change) for _, change in once] == [text_of(change) for _, change in again]
    others = [
        decoded(name, "12|______", noisy(3, 8, scale=0.5), settings, seed=seed, prompt=prompt)
        for seed, prompt in ((6, 7), (5, 8))
    ]
    texts = {text_of(found[-1][1]) for found in (once, *others)}
    assert len(texts) == 3


def drawn(logits, settings, text=None, **more):
    """What is proposed after drawing."""
    rule = rule_of("threshold", {"temperature": 1.0} | settings)
    logits = np.asarray(logits, dtype=float)
    return rule.read(seen_logits(text or "_" * len(logits), logits, **more), None)[0]


def test_a_draw_is_a_function_of_seed_prompt_position_and_step():
    logits = np.zeros((6, VOCABULARY))
    whole = drawn(logits, {}, draws=Draws(1, 2), first=8, step=3).choice_m
    shifted = drawn(logits, {}, draws=Draws(1, 2), first=10, step=3).choice_m
    fewer = drawn(logits, {}, text="12|____", draws=Draws(1, 2), first=8, step=3).choice_m
    np.testing.assert_array_equal(whole[2:], shifted[:-2])
    np.testing.assert_array_equal(whole[2:], fewer[2:])
    for other in (
        drawn(logits, {}, draws=Draws(2, 2), first=8, step=3),
        drawn(logits, {}, draws=Draws(1, 3), first=8, step=3),
        drawn(logits, {}, draws=Draws(1, 2), first=8, step=4),
        drawn(logits, {}, draws=Draws(1, 2), first=9, step=3),
    ):
        assert (other.choice_m != whole).any()


def test_positions_and_steps_leave_the_numbers_of_samples_as_they_were():
    bits = np.random.Philox(key=[3, int(Purpose.MASK)], counter=[0, 0, 0, 5])
    expected = np.random.Generator(bits).random(4)
    np.testing.assert_array_equal(generator(3, Purpose.MASK, 5).random(4), expected)
    assert (generator(3, Purpose.MASK, 5, position=1).random(4) != expected).all()
    assert (generator(3, Purpose.MASK, 5, step=1).random(4) != expected).all()


def test_no_number_is_drawn_twice():
    draws = Draws(3, 5)
    drawn = [draws.uniform(position, step, 50) for position in range(4) for step in range(4)]
    assert len(np.unique(drawn)) == 4 * 4 * 50


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25, 0.09, 0.0225, 0.0025]),
        ({"top_k": 2}, [0.5, 0.3, 0, 0]),
        ({"top_p": 0.49}, [0.5, 0, 0, 0]),
        ({"top_p": 0.6}, [0.5, 0.3, 0, 0]),
        ({"top_p": 0.81}, [0.5, 0.3, 0.15, 0]),
        ({"top_k": 3, "top_p": 0.7}, [0.5, 0.3, 0, 0]),
    ],
)
def test_tokens_are_drawn_by_their_probability(settings, expected):
    n = 4000
    logits = np.full((n, VOCABULARY), -np.inf)
    logits[:, [0, 1, 2, 3]] = np.log([0.5, 0.3, 0.15, 0.05])
    logits[:, MASK] = 5  # never drawn
    seen = drawn(logits, settings)
    expected = np.array(expected) / sum(expected)
    counts = np.bincount(seen.choice_m, minlength=VOCABULARY)
    assert counts.sum() == counts[:4].sum()
    sigma = np.sqrt(n * expected * (1 - expected))
    assert (np.abs(counts[:4] - n * expected) <= 5 * sigma).all()
    np.testing.assert_allclose(seen.probability_m, expected[seen.choice_m], rtol=1e-6)


def test_a_drawn_token_may_be_judged_by_the_models_own_probability():
    logits = np.random.default_rng(2).normal(size=(5, VOCABULARY))
    seen = drawn(logits, {"temperature": 2.0, "top_k": 3, "plain_confidence": True})
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(seen.probability_m, p[np.arange(5), seen.choice_m], rtol=1e-5)


def test_entropy_is_that_of_what_is_drawn_from():
    logits = np.random.default_rng(2).normal(size=(5, VOCABULARY))
    for plain in (True, False):
        settings = {"temperature": 0.5, "top_k": 1, "plain_confidence": plain}
        seen = rule_of("entropy", settings).read(seen_logits("_____", logits), None)[0]
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        expected = -(p * np.log(p)).sum(-1) if plain else np.zeros(5)
        np.testing.assert_allclose(seen.entropy_m, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("best", {}, "There is no rule 'best': give threshold, quota, factor"),
        ("threshold", {"factor": 1}, "Rule threshold has no setting factor: give threshold, temperature"),
        ("threshold", {"threshold": 1.01}, "threshold=1.01 is out of range: give a number of at least 0"),
        ("threshold", {"threshold": -0.1}, "threshold=-0.1 is out of range"),
        ("threshold", {"threshold": "nan"}, "threshold=nan is out of range"),
        ("threshold", {"threshold": "high"}, "threshold of rule threshold is 'high': give a number"),
        ("quota", {"steps": "2.5"}, "steps of rule quota is '2.5': give a whole number"),
        ("quota", {"steps": 2.5}, "steps of rule quota is 2.5: give a whole number"),
        ("quota", {"steps": True}, "steps of rule quota is True: give a whole number"),
        ("quota", {"steps": None}, "steps of rule quota is None: give a whole number"),
        ("factor", {"accepts_last": 1}, "accepts_last of rule factor is 1: give true or false"),
        ("factor", {"factor": 0}, "factor=0.0 is out of range"),
        ("credit", {"credit_beta": 1}, "credit_beta=1.0 is out of range"),
        ("klass", {"kl_history": 0}, "kl_history=0 is out of range"),
        ("joint", {"at_least": 0}, "at_least=0 is out of range"),
        ("threshold", {"temperature": -1}, "temperature=-1.0 is out of range"),
        ("threshold", {"temperature": 1, "top_p": 0}, "top_p=0.0 is out of range"),
        ("threshold", {"top_k": 5}, "Nothing is drawn at temperature 0: give one above 0 with top_k"),
    ],
)
def test_what_is_no_rule_is_refused_in_a_sentence(name, settings, sentence):
    with pytest.raises(BadInput) as refused:
        rule_of(name, settings)
    assert str(refused.value).startswith(sentence) and "\n" not in str(refused.value)


def test_settings_are_read_from_text():
    assert rule_of("factor", {"factor": "2", "accepts_last": "true"}) == RULES["factor"](2.0, True)
    drawing = rule_of("quota", {"steps": "4", "temperature": "0.7", "top_k": "5"})
    assert drawing.rule == RULES["quota"](steps=4) and drawing.sampling == Sampling(0.7, 5)


def test_a_setting_of_several_rules_is_of_one_kind():
    kinds = {}
    for name in RULES:
        for key, setting in settings_of(name).items():
            assert kinds.setdefault(key, setting.kind) is setting.kind
    assert not {each.name for each in fields(Sampling)} & {
        each.name for rule in RULES.values() for each in fields(rule)
    }


@pytest.fixture(scope="module")
def group():
    groups.initialize(LayoutConfig())
    try:
        from megatron.core import parallel_state

        yield parallel_state.get_tensor_model_parallel_group()
    finally:
        groups.destroy()


@given(st.integers(0, 2**32), st.sampled_from([0.0, 50.0, 500.0]))
def test_few_figures_say_what_all_logits_say(group, seed, mask_logit):
    logits = np.random.default_rng(seed).normal(size=(5, VOCABULARY)) * 3
    logits[:, 3] = logits[:, 5]  # equal ones
    logits[:, MASK] = mask_logit
    table = torch.tensor(logits, dtype=torch.float32)
    output = Figures.entropy.readout(MASK)(table, None, group).numpy()
    few, everything = figures_of(Figures.entropy, output, MASK), figures_of(Figures.logits, logits, MASK)
    np.testing.assert_array_equal(few["choice_m"], everything["choice_m"])
    np.testing.assert_allclose(few["probability_m"], everything["probability_m"], rtol=1e-5, atol=1e-12)
    expected = torch.special.entr(torch.softmax(table.double(), -1)).sum(-1)
    np.testing.assert_allclose(few["entropy_m"], expected, atol=1e-4)
