"""Levenshtein labels: obeyed again and again they make the target of any draft, in a block of one length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.generate.rules import rule_of
from llada_megatron.generate.rules.insertion import InDel
from llada_megatron.generate.rules.seen import Seen
from llada_megatron.objectives.alignment import edit_labels, ends, paired_with
from tests.objectives.edits import DELETE, MASK, SPLIT, obeyed, obeyed_together, pairs

CASES = [
    # draft, target, labels; letters are tokens, _ a mask, - and + the orders
    ("abcd", "abcd", "abcd"),
    ("a_cd", "abcd", "abcd"),
    ("axcd", "abcd", "abcd"),
    ("axbc", "abcd", "a-bc"),  # the place at the end becomes a mask
    ("acd_", "abcd", "a+d-".replace("+d", "+d")),
    ("ad__", "abcd", "a+--"),  # two are missing: room for one of them
    ("a_d_", "abcd", "ab+-"),
    ("____", "abcd", "abcd"),
    ("bcda", "abcd", "+cd-"),
    ("_ab", "aab", "aab"),  # not: the second a is the first one, so that the mask is surplus
    ("ab_d_d_", "abddddd", "abddddd"),
    ("wxyz", "abcd", "abcd"),
]


def tokens(word: str) -> list[int]:
    special = {"_": MASK, "-": DELETE, "+": SPLIT}
    return [special.get(letter, ord(letter) - ord("a")) for letter in word]


def labels_of(draft: list[int], target: list[int]) -> list[int]:
    return edit_labels(np.array([draft]), np.array([target]), DELETE, SPLIT)[0].tolist()


@pytest.mark.parametrize(("draft", "target", "labels"), CASES)
def test_labels_by_hand(draft: str, target: str, labels: str) -> None:
    assert labels_of(tokens(draft), tokens(target)) == tokens(labels)


def longest_common(draft: list[int], target: list[int]) -> int:
    """By the textbook, from the front."""
    row = [0] * (len(target) + 1)
    for token in draft:
        before = row
        row = [0]
        for j, other in enumerate(target):
            row.append(before[j] + 1 if token == other else max(before[j + 1], row[j]))
    return row[-1]


blocks = st.integers(1, 7).flatmap(
    lambda m: st.tuples(
        st.lists(st.sampled_from([0, 1, 2, 3, MASK]), min_size=m, max_size=m),
        st.lists(st.integers(0, 3), min_size=m, max_size=m),
    )
)


@given(blocks)
def test_what_is_kept_is_a_longest_common_subsequence_and_orders_are_obeyed_as_the_rule_does(pair) -> None:
    draft, target = pair
    pair_m = paired_with(np.array([draft]), np.array([target]))[0]
    kept = pair_m[pair_m >= 0]
    assert len(kept) == longest_common(draft, target) and (np.diff(kept) > 0).all()
    assert all(draft[i] == target[j] for i, j in enumerate(pair_m) if j >= 0)
    labels = labels_of(draft, target)
    assert obeyed(draft, labels) == as_the_rule(draft, labels)
    assert obeyed_together(np.array([draft]), np.array([labels])).tolist() == [obeyed(draft, labels)]


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=12))
def test_masks_alone_are_filled_where_they_stand(text) -> None:
    target = [token for token, _ in text]
    draft = [MASK if is_masked else token for token, is_masked in text]
    assert labels_of(draft, target) == target


def as_the_rule(draft: list[int], labels: list[int]) -> list[int]:
    """What our decoding rule makes of a block where every label is written."""
    m = len(draft)
    rule = rule_of("indel", {"delete_id": str(DELETE), "split_id": str(SPLIT)})
    assert isinstance(rule, InDel)
    before = np.array(draft)
    choice = np.array(labels)
    seen = Seen(before, np.zeros(m, bool), before == MASK, choice, np.ones(m), mask_token_id=MASK)
    return rule._revised(seen, before != choice, choice, before == MASK)[0].tolist()


def rounds(draft_Km: np.ndarray, target_Km: np.ndarray, most: int) -> int:
    """How often labels are obeyed until every draft is its target; what is right stays right."""
    right = -1
    for count in range(most + 1):
        if (draft_Km == target_Km).all():
            return count
        labels_Km = edit_labels(draft_Km, target_Km, DELETE, SPLIT)
        now = (paired_with(draft_Km, target_Km) >= 0).sum(axis=1)
        assert (now >= right).all()
        right = now
        draft_Km = obeyed_together(draft_Km, labels_Km)
    raise AssertionError(f"{(draft_Km != target_Km).any(axis=1).sum()} drafts are not done")


SHAPES = {(4, 2): 400, (8, 3): 400, (16, 6): 150, (32, 2): 30, (32, 1000): 20}
"""Tokens of a block and words; of a million pairs so many thousands."""


@pytest.mark.parametrize(("m", "words"), SHAPES)
def test_labels_obeyed_again_and_again_give_the_target(m: int, words: int) -> None:
    assert rounds(*pairs(1000, m, words, seed=0), most=m) > 1


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize(("m", "words"), SHAPES)
def test_a_million_random_pairs_become_the_target(m: int, words: int) -> None:
    for seed in range(1, SHAPES[m, words] // 10 + 1):
        rounds(*pairs(10_000, m, words, seed), most=m)


def test_a_shorter_block_has_the_labels_that_it_has_alone() -> None:
    m, longer = 5, 9
    draft, target = pairs(500, m, 3, seed=0)
    behind = np.tile(ends(longer)[m:], (500, 1))
    together = edit_labels(
        np.concatenate([draft, behind], axis=1), np.concatenate([target, behind], axis=1), DELETE, SPLIT
    )
    assert (together[:, :m] == edit_labels(draft, target, DELETE, SPLIT)).all()
