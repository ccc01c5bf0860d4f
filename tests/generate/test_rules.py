"""Decoding rules: each on one block, by hand; what all of them promise; and their names and settings."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.generate.rules import RULES, Draws, Figures, Seen, figures_of, rule_of, settings_of
from llada_megatron.generate.rules.sampling import Sampling
from llada_megatron.generate.rules.seen import entropy, log_probability
from llada_megatron.parallel import groups
from llada_megatron.parallel.random import Purpose, generator

MASK, DELETE, SPLIT, VOCABULARY = 15, 14, 13, 16
ORDERS = {"delete_id": DELETE, "split_id": SPLIT}


def block(text):
    """Tokens of a block: digits, `_` for a mask; those before a `|` are given."""
    given, _, rest = text.rpartition("|")
    tokens = np.array([MASK if c == "_" else int(c) for c in given + rest])
    return tokens, np.arange(len(tokens)) < len(given)


def seen_of(text, probability=None, choice=None, **more):
    """What a forward said of a block; the choice of position i is i unless given."""
    tokens, is_prompt = block(text)
    choice = np.arange(len(tokens)) if choice is None else np.array(choice)
    probability = np.zeros(len(tokens)) if probability is None else np.array(probability, dtype=float)
    is_masked = (tokens == MASK) & ~is_prompt
    return Seen(tokens, is_prompt, is_masked, choice, probability, mask_token_id=MASK, **more)


def seen_logits(text, logits, **more):
    tokens, is_prompt = block(text)
    figures = figures_of(Figures.logits, np.asarray(logits), MASK)
    return Seen(tokens, is_prompt, (tokens == MASK) & ~is_prompt, **figures, mask_token_id=MASK, **more)


def logits_of(*rows):
    """Rows of tokens from most to least likely, ten nats apart from the rest."""
    table = np.full((len(rows), VOCABULARY), -20.0)
    for row, tokens in zip(table, rows, strict=True):
        row[list(tokens)] = 10.0 - np.arange(len(tokens))
    return table


def text_of(change):
    return "".join("_" if token == MASK else format(token, "x") for token in change.tokens_m)


def filled(name, text, probability, settings=None, **more):
    """The block after a first forward under a rule."""
    return text_of(rule_of(name, settings).step(seen_of(text, probability, **more), None))


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


def joint(text, choice, probability, state=None, **settings):
    settings = {"threshold": 0.5, "edit_threshold": 0.5, "max_post_edits": 2} | settings
    return rule_of("joint", settings).step(seen_of(text, probability, choice), state)


def test_joint_threshold_fills_and_edits_at_once():
    change = joint("1|23__", [9, 9, 9, 4, 5], [1, 0.6, 0.5, 0.6, 0.1])
    assert text_of(change) == "1934_" and not change.is_done  # given stays, 0.5 is not above 0.5
    least = joint("__12", [1, 2, 1, 2], [0.1, 0.2, 1, 1], at_least=2)
    assert text_of(least) == "1212" and not least.is_done  # full, and may still change


def test_joint_threshold_ends_when_nothing_changes_or_after_its_edits():
    still = joint("1|23", [9, 2, 3], [1, 1, 1])
    assert still.is_done and text_of(still) == "123"
    once = joint("1|23", [9, 4, 3], [1, 1, 1])
    twice = joint("1|43", [9, 5, 3], [1, 1, 1], once.state)
    assert not once.is_done and twice.is_done and text_of(twice) == "153"
    filled = joint("1|_3", [9, 4, 3], [1, 1, 1], max_post_edits=0)
    assert filled.is_done and text_of(filled) == "143"


def test_a_penalty_falls_on_the_left_neighbours_token():
    logits = logits_of([3, 4], [3, 4], [3, 4])
    rule = rule_of("joint", {"threshold": 0, "penalty_lambda": 5})
    assert (
        text_of(rule.step(seen_logits("3|__", logits), None)) == "343"
    )  # the neighbour of the last is a mask


def indel(text, logits, state=None, **settings):
    return rule_of("indel", ORDERS | settings).step(seen_logits(text, logits), state)


def test_what_a_checkpoint_says_is_a_default_of_the_rules_that_have_it():
    rule = rule_of("indel", {"split_id": 9}, of_checkpoint={"delete_id": 8, "split_id": 7})
    assert (rule.delete_id, rule.split_id) == (8, 9)
    assert rule_of("joint", of_checkpoint={"delete_id": 8}) == rule_of("joint")
    assert (rule_of("indel").delete_id, rule_of("indel").split_id) == (156930, 156931)


def test_deletion_and_splitting_move_what_follows():
    change = indel("3|____", logits_of([3], [SPLIT, 5], [DELETE, 6], [7], [8]))
    assert text_of(change) == "3__78"  # the split's mask, the mask that stood there, one deleted
    assert change.state.is_original_m.tolist() == [False, False, True, True, True]
    over = indel("3|456", logits_of([3], [SPLIT], [SPLIT], [6]))
    assert text_of(over) == "3_4_"
    under = indel("3|456", logits_of([3], [DELETE], [DELETE], [6]))
    assert text_of(under) == "36__" and not under.state.is_original_m.any()


def test_orders_in_the_prompt_are_tokens_like_others():
    seen = seen_logits("12|__", logits_of([5], [6], [7], [8]))
    seen.tokens_m[:2] = DELETE, SPLIT
    assert rule_of("indel", ORDERS).step(seen, None).tokens_m.tolist() == [DELETE, SPLIT, 7, 8]


def test_more_masks_are_filled_than_were_put_in():
    first = indel("3|_", logits_of([3], [5]))
    logits = np.zeros((5, VOCABULARY))
    for position, score in zip((3, 4, 1, 2), (9, 8, 7, 6), strict=True):
        logits[position, position + 4] = score
    state = replace(first.state, is_original_m=np.array([False, True, True, False, False]))
    change = indel("3|____", logits, state, threshold=1)
    assert text_of(change) == "35_78"  # the two put in are likelier, so three are filled


def test_no_original_mask_is_filled_with_a_mask():
    assert text_of(indel("3|_4", logits_of([3], [MASK, 5], [4]), threshold=1)) == "354"


def test_a_block_that_comes_back_gets_another_token():
    back_and_forth = [logits_of([3], [5]), logits_of([3], [4, 6])]
    text, state, texts = "3|4", None, []
    for step in range(4):
        change = indel(text, back_and_forth[step % 2], state)
        state, text = change.state, "3|" + text_of(change)[1:]
        texts.append(text_of(change))
    assert texts[:2] == ["35", "34"] and texts[2] != "35"


def test_the_last_update_leaves_ordinary_tokens_alone():
    logits = logits_of([3], [DELETE, MASK, 6], [SPLIT, 7])
    change = indel("3|__", logits, max_post_edits=0)
    assert change.is_done and text_of(change) == "367"


def test_a_block_without_an_end_of_its_own_gets_one():
    state = indel("3|____", logits_of([3], [4], [SPLIT], [SPLIT], [SPLIT])).state
    logits = logits_of([3], [5], [SPLIT, 6], [SPLIT, 6], [SPLIT, 6])
    assert not indel("3|____", logits, replace(state, updates=5 + 16 - 1)).is_done
    last = indel("3|____", logits, replace(state, updates=5 + 16))
    assert last.is_done and text_of(last) == "35666"


@pytest.mark.parametrize(
    ("text", "settings", "sentence"),
    [
        ("3|__", {"delete_id": SPLIT}, "give three different tokens"),
        ("3|__", {"split_id": MASK}, "give three different tokens"),
    ],
)
def test_orders_must_be_tokens_of_their_own(text, settings, sentence):
    with pytest.raises(BadInput, match=sentence):
        indel(text, logits_of([3], [4], [5]), **settings)


def test_a_block_with_holes_is_not_for_a_rule_that_moves_tokens():
    seen = seen_logits("____", logits_of([3], [4], [5], [6]))
    seen = replace(seen, is_prompt_m=np.array([False, False, True, False]))
    with pytest.raises(BadInput, match="without holes"):
        rule_of("indel", ORDERS).step(seen, None)


def soft(text, choice, probability, forwards=None, **settings):
    return rule_of("soft", settings).step(seen_of(text, probability, choice), forwards)


def test_soft_decoding_proposes_every_token_anew_and_reads_as_much_of_it_as_it_is_sure():
    change = soft("1|2__3", [9, 8, 7, 6, 5], [1, 0.2, 0.6, 0.5, 0.95])
    assert text_of(change) == "187_5" and not change.is_done  # given stays, 0.5 is not above 0.5
    np.testing.assert_array_equal(change.weight_m, [1, 0.2, 0.6, 1, 0.95])
    best = soft("__", [3, 4], [0.1, 0.2])
    assert text_of(best) == "_4" and best.weight_m.tolist() == [1, 0.2]


@pytest.mark.parametrize(
    ("text", "choice", "probability", "settings", "is_done"),
    [
        ("1|23", [9, 2, 3], [0, 0.1, 0.1], {}, True),  # nothing changes
        ("1|23", [9, 2, 4], [0, 0.9, 0.9], {}, True),  # all are sure, the given one does not count
        ("1|23", [9, 2, 4], [0, 0.9, 0.89], {}, False),
        ("1|23", [9, 2, 4], [0, 0.9, 0.89], {"confident_at": 0.8}, True),
        ("1|2_", [9, 2, 4], [0, 0.95, 0.95], {}, True),
        ("1|__", [9, 2, 4], [0, 0.95, 0.95], {"threshold": 0.97}, False),  # sure, and a mask is left
    ],
)
def test_soft_decoding_ends_when_it_is_sure_or_nothing_changes(text, choice, probability, settings, is_done):
    assert soft(text, choice, probability, **settings).is_done is is_done


def test_soft_decoding_ends_with_tokens_after_its_last_forward():
    before, last = (soft("____", [1, 2, 3, 4], [0.1] * 4, n, steps=3) for n in (1, 2))
    assert (text_of(before), before.is_done) == ("1___", False)
    assert (text_of(last), last.is_done) == ("1234", True)
    assert soft("____", [1, 2, 3, 4], [0.1] * 4, 3).is_done  # as many as positions


def test_soft_decoding_may_fill_from_the_left_alone():
    for probability, after in (
        ([0.6, 0.5, 0.4, 0.9], "12__"),  # exactly at the threshold: filled
        ([0.4, 0.9, 0.9, 0.9], "1___"),
        ([0.9, 0.9, 0.9, 0.9], "1234"),
    ):
        assert text_of(soft("____", [1, 2, 3, 4], probability, from_left=True)) == after


@pytest.mark.parametrize(
    ("name", "step", "sigmas", "fills"),
    [
        # Of 4 forwards the third: alpha 1/2 -> 3/4, sigma_max = 1/4 / 1/2 = 1/2.
        ("remdm_cap", 2, [0.1] * 3, (0.75 - 0.9 * 0.5) / 0.5),
        ("remdm_rescale", 2, [0.05] * 3, (0.75 - 0.95 * 0.5) / 0.5),
        # The second: alpha 1/4 -> 1/2, sigma_max = 1.
        ("remdm_cap", 1, [0.1] * 3, (0.5 - 0.9 * 0.25) / 0.75),
        ("remdm_rescale", 1, [0.1] * 3, (0.5 - 0.9 * 0.25) / 0.75),
        # softmax(-0.2, -0.9) = 0.668, 0.332; what is masked has none, and is filled as without.
        ("remdm_conf", 2, [0.5 / (1 + np.exp(-0.7)), 0.5 / (1 + np.exp(0.7)), 0], (0.75 - 0.5) / 0.5),
        ("remdm_conf", 1, [1 / (1 + np.exp(-0.7)), 1 / (1 + np.exp(0.7)), 0], (0.5 - 0.25) / 0.75),
        ("remdm_cap", 3, [0, 0, 0], 1),
        ("remdm_rescale", 3, [0, 0, 0], 1),
        ("remdm_conf", 3, [0, 0, 0], 1),
    ],
)
def test_remasking_takes_back_and_fills_with_the_published_probabilities(name, step, sigmas, fills):
    rule = rule_of(name, {"steps": 4} | ({} if name == "remdm_conf" else {"eta": 0.1}))
    n = 1500
    counts = np.zeros(3)
    for number in range(n):
        seen = seen_of("5|78_", [1, 0.5, 0.5, 0.3], step=step, first=32, draws=Draws(7, number))
        change = rule.step(seen, np.array([np.inf, 0.2, 0.9, np.inf]))
        counts += text_of(change)[1] == "_", text_of(change)[2] == "_", text_of(change)[3] == "3"
        assert change.is_done == (step == 3) and text_of(change)[0] == "5"
        is_decided = change.tokens_m[1:] != MASK
        np.testing.assert_array_equal(change.state[1:], np.where(is_decided, [0.2, 0.9, 0.3], np.inf))
    expected = np.array([*sigmas[:2], fills])
    assert (np.abs(counts - n * expected) <= 5 * np.sqrt(n * expected * (1 - expected))).all()


def test_without_sigma_remasking_is_ancestral_unmasking():
    for seed in range(5):
        found = decoded("remdm_cap", "123|_____", noisy(seed, 8), {"eta": 0, "steps": 5}, seed=seed)
        assert len(found) == 5
        for step, (seen, change) in enumerate(found):
            draw = np.array([seen.draws.remasking(32 + position, step) for position in range(8)])
            is_filled = seen.is_masked_m & (draw < 1 / (5 - step))  # (s - t) / (1 - t)
            np.testing.assert_array_equal(change.tokens_m, np.where(is_filled, seen.choice_m, seen.tokens_m))
    rescaled = decoded("remdm_rescale", "123|_____", noisy(4, 8), {"eta": 0, "steps": 5}, seed=4)
    assert [text_of(change) for _, change in rescaled] == [text_of(change) for _, change in found]


def test_remasking_leaves_the_expected_share_of_tokens_at_each_forward():
    m, steps, blocks, shares, taken = 64, 8, 40, np.zeros(8), 0
    for number in range(blocks):
        for step, (seen, change) in enumerate(
            decoded("remdm_cap", "_" * m, noisy(1, m), {"eta": 0.3, "steps": steps}, prompt=number)
        ):
            shares[step] += (change.tokens_m != MASK).mean() / blocks
            taken += ((seen.tokens_m != MASK) & (change.tokens_m == MASK)).sum()
    np.testing.assert_allclose(shares, np.arange(1, 9) / 8, atol=5 * np.sqrt(0.25 / (m * blocks)))
    # Of i / 8 tokens each forward takes min(0.3, sigma_max), sigma_max = (8 - i - 1) / i.
    share = sum(i / 8 * min(0.3, (7 - i) / i) for i in range(1, 8))
    assert abs(taken - share * m * blocks) < 5 * np.sqrt(share * m * blocks)


def verified(text, probability, verified, filled_before, **settings):
    rule = rule_of("wino", {"threshold": 0.5, "verify_threshold": 0.8} | settings)
    return rule.step(seen_of(text, probability, verified_m=np.array(verified)), filled_before)


@pytest.mark.parametrize(
    ("text", "probability", "of_standing", "filled_before", "after"),
    [
        ("9|78___", [1, 0, 0, 0.6, 0.7, 0.2], [1, 0.8, 0.7, 1, 1, 1], 4, "97_34_"),  # exactly at it: kept
        ("9|78___", [1, 0, 0, 0.6, 0.2, 0.2], [1, 0.8, 0.7, 1, 1, 1], 4, "9783__"),  # one is filled: none
        ("9|78___", [1, 0, 0, 0.2, 0.3, 0.2], [1, 0.1, 0.1, 1, 1, 1], 4, "978_4_"),  # the best one: none
        ("9|78___", [1, 0, 0, 0.6, 0.7, 0.2], [1, 0.3, 0.2, 1, 1, 1], 2, "97_34_"),  # the least, of 2 - 1
        ("9|78___", [1, 0, 0, 0.6, 0.7, 0.2], [1, 0.3, 0.2, 1, 1, 1], 1, "97834_"),
        ("9|78___", [1, 0, 0, 0.6, 0.7, 0.2], [1, 0.3, 0.2, 1, 1, 1], None, "9__34_"),  # a draft stood there
    ],
)
def test_wino_masks_again_what_it_doubts_but_fewer_than_it_filled(
    text, probability, of_standing, filled_before, after
):
    change = verified(text, probability, of_standing, filled_before)
    assert text_of(change) == after and not change.is_done


def test_wino_fills_no_more_than_its_bounds():
    p = np.linspace(0.6, 0.9, 40)
    for settings, masks, expected in (
        ({}, 40, 20),
        ({}, 20, 14),
        ({}, 6, 5),
        ({"draft_most": 40}, 40, 28),
        ({"draft_share": 0.5, "draft_least": 1}, 6, 3),
    ):
        seen = Seen(
            np.where(np.arange(40) < 40 - masks, 3, MASK), np.arange(40) < 40 - masks,
            np.arange(40) >= 40 - masks, np.full(40, 2), p, verified_m=np.ones(40), mask_token_id=MASK,
        )  # fmt: skip
        change = rule_of("wino", settings).step(seen, None)
        assert change.state == expected
        assert np.flatnonzero(change.tokens_m == 2).tolist() == [*range(40 - expected, 40)]


@pytest.mark.parametrize("draft", [0, 12, 32])
def test_wino_that_doubts_everything_is_done_after_as_many_forwards_as_positions(draft):
    m, state, rule = 32, None, rule_of("wino", {"threshold": 0})
    tokens = np.where(np.arange(m) < draft, 3, MASK)
    for step in range(m):
        is_masked = tokens == MASK
        seen = Seen(
            tokens, np.zeros(m, bool), is_masked, np.full(m, 2), np.ones(m),
            verified_m=is_masked.astype(float), mask_token_id=MASK, step=step,
        )  # fmt: skip
        change = rule.step(seen, state)
        tokens, state = change.tokens_m, change.state
        if change.is_done:
            break
    assert change.is_done and (step > 5 or draft == m)


def test_no_remasking_shares_a_number_with_a_draw_of_tokens():
    draws = Draws(3, 5)
    numbers = [draws.remasking(position, step) for position in range(20) for step in range(20)]
    tokens = [draws.uniform(position, step, 4) for position in range(20) for step in range(20)]
    assert len(np.unique([*numbers, *np.ravel(tokens)])) == 5 * 400


EDITING = ("joint", "indel", "soft", "remdm_cap", "remdm_rescale", "remdm_conf", "wino")
FILLING = [name for name in RULES if name not in EDITING]


def decoded(name, text, logits_at, settings=None, seed=0, prompt=0, most=60):
    """Every (seen, change) of a block until the rule is done; logits_at: step -> [m, V]."""
    rule = rule_of(name, (ORDERS if name == "indel" else {}) | (settings or {}))
    state, found, (tokens, is_prompt) = None, [], block(text)
    for step in range(most):
        logits = logits_at(step)
        figures = figures_of(Figures.logits, logits, MASK)
        if rule.figures is not Figures.logits:
            del figures["logits_mV"]
            figures["entropy_m"] = entropy(log_probability(logits))
        is_masked = (tokens == MASK) & ~is_prompt
        standing = np.exp(log_probability(logits))[np.arange(len(tokens)), tokens]
        seen = Seen(
            tokens,
            is_prompt,
            is_masked,
            **figures,
            verified_m=np.where(is_prompt | is_masked, 1.0, standing),
            step=step,
            first=32,
            mask_token_id=MASK,
            draws=Draws(seed, prompt),
        )
        change = rule.step(seen, state)
        found.append((seen, change))
        tokens, state = change.tokens_m, change.state
        if change.is_done:
            return found
    raise AssertionError(f"{name} is not done after {most} forwards")


def noisy(seed, m, scale=3.0):
    def logits_at(step):
        logits = np.random.default_rng([seed, step]).normal(size=(m, VOCABULARY)) * scale
        logits[:, MASK] += 3  # what must not be proposed is likely
        return logits

    return logits_at


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
