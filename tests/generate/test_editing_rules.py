"""Rules that change tokens (joint, indel, soft, ReMDM, WINO), each on one block, by hand."""

from dataclasses import replace

import numpy as np
import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.generate.rules import Draws, Seen, rule_of
from tests.generate.rule_blocks import (
    DELETE,
    MASK,
    ORDERS,
    SPLIT,
    VOCABULARY,
    decoded,
    logits_of,
    noisy,
    seen_logits,
    seen_of,
    text_of,
)


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
