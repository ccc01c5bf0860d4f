"""The order in which tokens were decided, and the pieces of a text that show it."""

import numpy as np

from llada_megatron.generate.prompt import BlockChanged
from llada_megatron.generate.trace import GIVEN, Trace, pieces_of

MASK = 9


def changes(*rows, prompt=0, first=2):
    trace = Trace()
    for row in rows:
        tokens = np.array(row)
        trace.add(BlockChanged(prompt, first, tokens, tokens == MASK, is_done=False))
    return trace.decisions[prompt]


def test_each_token_has_the_forward_that_decided_it_and_is_edited_when_it_replaced_another():
    decided = changes([1, MASK, MASK], [1, MASK, 3], [4, 2, 3])
    assert decided == {2: (3, True), 3: (3, False), 4: (2, False)}


def test_a_token_that_is_hidden_and_comes_again_keeps_its_place_and_another_one_replaces_it():
    assert changes([1, 2], [MASK, MASK], [1, 3]) == {2: (1, False), 3: (3, True)}


def test_forwards_are_counted_for_each_prompt():
    trace = Trace()
    for prompt in (0, 0, 1):
        trace.add(BlockChanged(prompt, 0, np.array([prompt + len(trace.decisions)]), np.array([False]), True))
    assert trace.decisions[1][0][0] == 1


def test_pieces_are_the_whole_text_and_a_character_belongs_to_its_last_token():
    tokens = list("aé→b".encode())
    decisions = [GIVEN, (1, False), (2, False), (2, False), (3, True), (3, True), GIVEN]

    def text(ids):
        return bytes(ids).decode(errors="replace")

    pieces = pieces_of(tokens, decisions, text)
    assert pieces == [("a", None, False), ("é", 2, False), ("→", 3, True), ("b", None, False)]


def test_half_a_character_at_the_end_is_shown_as_one():
    pieces = pieces_of([97, 0xC3], [GIVEN, (1, False)], lambda ids: bytes(ids).decode(errors="replace"))
    assert pieces == [("a", None, False), ("\ufffd", 1, False)]
