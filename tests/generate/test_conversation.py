"""Turns of a chat: the rendered conversation is decoded, what was said stays, and earlier keys serve."""

from itertools import pairwise

import numpy as np
import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.data.chat import ChatEncoder
from llada_megatron.data.chat_template import load_template
from llada_megatron.data.tokenizer import load_tokenizer
from llada_megatron.generate import Decoder, Limits
from llada_megatron.generate.branches import ANCHOR_ALONE, Lookahead
from llada_megatron.generate.buffer import ONE_BLOCK, Buffer
from llada_megatron.generate.conversation import STOPPED, Answer, Conversation, Draft, follow
from llada_megatron.generate.rules import rule_of
from llada_megatron.parallel import groups, ranks
from tests.distributed import run_ranks
from tests.generate.models import MASK, settings, tiny, uncached

RULE = rule_of("threshold", {"threshold": 0.05})
BLOCK, CONTEXT = 4, 96


def text(ids: list[int]) -> str:
    """A letter for each id, unlike bytes: whatever a random model writes is text."""
    return "".join(chr(33 + token % 90) for token in ids)


def conversation(model, **options) -> Conversation:
    tokenizer = load_tokenizer("bytes")
    encoder = ChatEncoder(load_template("plain", "bytes", tokenizer), tokenizer, only_last=True)
    decoder = Decoder(
        model,
        options.pop("rule", RULE),
        BLOCK,
        MASK,
        context=CONTEXT,
        batch=1,
        buffer=options.pop("buffer", ONE_BLOCK),
        lookahead=options.pop("lookahead", ANCHOR_ALONE),
        text=options.pop("text", text),
    )
    return Conversation(decoder, encoder, Limits(**({"new_tokens": 8} | options)))


@pytest.fixture(scope="module")
def model():
    groups.initialize(LayoutConfig())
    try:
        yield tiny(settings())
    finally:
        groups.destroy()


def never() -> bool:
    return False


def answer_of(said) -> Answer:
    *_, answer = said
    assert isinstance(answer, Answer)
    return answer


def test_a_turn_is_the_rendered_conversation_decoded(model):
    chat = conversation(model)
    answer = answer_of(chat.say("Hi", never))
    prompt = np.array(chat.encoder.prompt([{"role": "user", "content": "Hi"}]))
    expected, _ = uncached(model, prompt, 8, BLOCK, RULE)
    assert answer.text == text(expected.tolist()) and answer.tokens == 8 and answer.stop == "length"
    assert chat.messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": answer.text},
    ]


def test_the_keys_of_earlier_turns_are_not_computed_again(model):
    chat = conversation(model, new_tokens=4)
    first = answer_of(chat.say("abcdefgh", never))
    assert first.shared == 0
    asked = len(chat.encoder.prompt([{"role": "user", "content": "abcdefgh"}]))
    assert answer_of(chat.say("b", never)).shared >= asked // BLOCK * BLOCK > 0


def test_drafts_grow_into_the_answer_forward_by_forward(model):
    *drafts, answer = conversation(model).say("Hi there", never)
    assert all(isinstance(draft, Draft) for draft in drafts)
    assert [draft.forwards for draft in drafts] == list(range(1, len(drafts) + 1))
    assert answer.denoised == len(drafts) and answer.forwards >= len(drafts)
    for draft in drafts:
        assert answer.text.startswith(text(draft.tokens))
        assert len(draft.is_edited) == len(draft.block) <= BLOCK and not any(draft.is_edited)
    assert text(drafts[-1].tokens) == answer.text


def test_drafts_of_several_active_blocks_grow_into_the_answer(model):
    *drafts, answer = conversation(model, buffer=Buffer(3, 0.0, 0.0), new_tokens=40).say("Hi there", never)
    whole = text(drafts[-1].tokens)
    assert answer.text == whole and max(len(draft.block) for draft in drafts) > BLOCK
    for before, after in pairwise(drafts):
        assert after.done[: len(before.done)] == before.done and whole.startswith(text(after.tokens))
        slid = len(after.done) - len(before.done)
        stay = [token for token in before.block[:slid] if token is not None]
        assert after.done[len(before.done) :] == stay and len(stay) == slid


def test_an_editing_rule_says_which_tokens_it_replaced(model):
    rule = rule_of("joint", {"threshold": 0.05, "edit_threshold": 0.0})
    *drafts, _ = conversation(model, rule=rule, new_tokens=16).say("Hi there", never)
    edited = 0
    for before, after in pairwise(drafts):
        if after.done != before.done:
            continue
        for place, (old, new) in enumerate(zip(before.block, after.block, strict=True)):
            changed = old is not None and old != new
            edited += changed
            assert after.is_edited[place] == (changed or before.is_edited[place])
    assert edited


def test_a_draft_ends_with_its_end_token(model):
    chat = conversation(model)
    prompt = np.array(chat.encoder.prompt([{"role": "user", "content": "Hi"}]))
    end = int(uncached(model, prompt, 8, BLOCK, RULE)[0][2])
    first = answer_of(chat.say("Hi", never))
    *drafts, answer = conversation(model, end_tokens=[end]).say("Hi", never)
    assert answer.stop == "end" and answer.text == first.text[: answer.tokens]
    assert all(end not in draft.block[:-1] for draft in drafts)


def test_a_stopped_answer_stays_as_far_as_it_is_written(model):
    chat = conversation(model, new_tokens=40)
    presses = iter([False] * 5 + [True] * 99)
    *drafts, answer = chat.say("Hi", lambda: next(presses))
    assert answer.stop == STOPPED and answer.denoised == len(drafts) == 6
    assert answer.text == text(drafts[-1].tokens) == chat.messages[-1]["content"] != ""
    assert answer_of(chat.say("And?", never)).stop in ("length", "context")


def test_an_answer_without_text_leaves_no_trace(model):
    chat = conversation(model, text=lambda ids: "")
    answer_of(chat.say("Hi", never))
    assert chat.messages == []


def test_a_conversation_begins_anew_with_its_system_message(model):
    chat = conversation(model)
    chat.begin("Be brief.")
    answer_of(chat.say("Hi", never))
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    chat.begin(chat.system)
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_a_message_without_room_for_an_answer_is_a_sentence_and_changes_nothing(model):
    chat = conversation(model)
    answer_of(chat.say("Hi", never))
    before = list(chat.messages)
    with pytest.raises(BadInput, match=r"has \d+ tokens with this message, and .* context of 96 .*/reset"):
        answer_of(chat.say("x" * 100, never))
    assert chat.messages == before
    answer_of(chat.say("Hi", never))


def test_several_ranks_follow_the_first_one_and_stop_with_it():
    (alone,) = run_ranks(talked, 1, processes=1)
    assert all(alone) and len(alone[0]) < 24
    first, second = run_ranks(talked, 2, processes=2)
    assert first == alone and second is None


@pytest.mark.slow
def test_ranks_that_share_branches_hold_one_conversation():
    (alone,) = run_ranks(talked, 1, "tp", Lookahead(3), processes=1)
    first, second = run_ranks(talked, 2, "bp", Lookahead(3), processes=2)
    assert first == alone and second is None


def talked(ways: int, axis: str = "tp", lookahead: Lookahead = ANCHOR_ALONE) -> list[str] | None:
    config = settings(f"layout.{axis}={ways}", f"layout.processes={ways}", "layout.global_batch=2")
    groups.initialize(config.layout)
    try:
        chat = conversation(tiny(config), new_tokens=24, lookahead=lookahead)
        if ranks.rank():
            follow(chat.decoder, chat.limits)
            return None
        presses = iter([False, False, True, *[False] * 99])
        answers = [answer_of(chat.say(line, lambda: next(presses))).text for line in ("Hi", "And then?")]
        chat.end()
        return answers
    finally:
        groups.destroy()
