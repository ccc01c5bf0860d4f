"""Conversations as people write them, and the tokens that are learnt of them."""

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.data.chat import ChatEncoder, megatron_lm_of, messages_of, preference_of
from llada_megatron.data.chat_template import BUILT_IN, ChatTemplate
from llada_megatron.data.containers import BadRecord
from llada_megatron.data.conversations import ANSWER, ROLES
from llada_megatron.data.tokenizer import load_tokenizer

SYSTEM = {"role": "system", "content": "s"}
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "response": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]},
    ],
)
def test_every_way_of_writing_gives_the_same_messages(record):
    found = [{"role": message["role"], "content": message["content"]} for message in messages_of(record)]
    assert found == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "plain"}, "neither `messages`"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "the role 'robot'"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "an answer, is empty"),
        ({"messages": [USER, {"role": "assistant", "content": {"a": 1}}]}, "is not text"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": None}]}]},
            "is not text",
        ),
        ({"messages": [{"role": "r" * 9999, "content": "x"}]}, "the role 'r{39}: roles are"),
        ({"system": 3, "messages": [USER, ASSISTANT]}, "`system` is not a text"),
        ({"prompt": "q", "response": ""}, "`response` is empty"),
        ({"prompt": 3, "response": "a"}, "`prompt` is not a text"),
    ],
)
def test_what_is_no_chat_is_a_sentence(record, reason):
    with pytest.raises(BadInput, match=reason):
        messages_of(record)


@pytest.mark.parametrize(
    "record",
    [
        {"system": "s", "messages": [USER, ASSISTANT]},
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"system": "s", "prompt": "q", "response": "a"},
        {"system": "other", "messages": [SYSTEM, USER, ASSISTANT]},
    ],
)
def test_a_system_text_beside_the_messages_comes_first_unless_they_begin_with_one(record):
    assert messages_of(record) == [SYSTEM, USER, ASSISTANT]


def test_lines_of_megatron_lm_hold_a_conversation_after_each_system_message():
    other = {"role": "system", "content": "t"}
    record = {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT, other, USER, ASSISTANT]}
    assert megatron_lm_of(record) == [[SYSTEM, *[USER, ASSISTANT] * 2], [other, USER, ASSISTANT]]
    assert megatron_lm_of({"messages": [USER, ASSISTANT]}) == [[USER, ASSISTANT]]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "b"}]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "b"}]},
        {
            "prompt": "q",
            "chosen": [USER, ASSISTANT],
            "rejected": [USER, {"role": "assistant", "content": "b"}],
        },
    ],
)
def test_every_way_of_writing_a_preference_gives_the_same_pair(record):
    chosen, rejected = preference_of(record)
    assert [m["content"] for m in chosen] == ["q", "a"] and [m["content"] for m in rejected] == ["q", "b"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "q", "chosen": "a"}, "no `rejected`"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are equal"),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [{**USER, "content": "other"}, ASSISTANT]},
            "differ before",
        ),
        ({"chosen": [USER], "rejected": [ASSISTANT]}, "does not end with"),
    ],
)
def test_what_is_no_preference_is_a_sentence(record, reason):
    with pytest.raises(BadInput, match=reason):
        preference_of(record)


def test_as_many_tokens_are_learnt_as_were_rendered():
    template = ChatTemplate(BUILT_IN["plain"][0], "plain", {"eos_token": "."})
    encoder = ChatEncoder(template, load_tokenizer("bytes"), only_last=False)
    chat = [USER, ASSISTANT, USER, {"role": "assistant", "content": "äh"}]
    ids, roles = encoder.encode(chat)
    assert bytes(ids.tolist()).decode() == template.render(chat)
    learnt = bytes(ids[roles >= ANSWER].tolist()).decode()
    assert learnt == "a.äh."
    assert [ROLES[role - ANSWER] for role in roles.tolist() if role >= ANSWER] == ["assistant"] * 6


MARKED = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
TEMPLATES = {
    "plain": BUILT_IN["plain"][0],
    "llada2": BUILT_IN["llada2"][0],
    "marked": MARKED + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
}


class Pieces:
    """Tokens by the names of pieces: one for each text that was tokenized by itself."""

    def __init__(self):
        self.names = {}

    def encode(self, text, parse_special=False):
        return [self.names.setdefault(text, len(self.names))] if text else []

    def defused(self, text, mark):
        return text.replace("<|end|>", f"<{mark}|end|>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_an_answer_was_learnt_after_piece_by_piece(name):
    template = ChatTemplate(TEMPLATES[name], name, {"eos_token": "<eos>"})
    encoder = ChatEncoder(template, Pieces(), only_last=False)
    chat = [{"role": "system", "content": "s"}, USER, ASSISTANT, {"role": "user", "content": "<|end|>?"}]
    for messages in (chat[:2], chat):
        ids, roles = encoder.encode([*messages, {"role": "assistant", "content": "the answer"}])
        assert roles[-1] >= ANSWER > roles[-2]  # the answer is one piece
        assert encoder.prompt(messages) == ids[:-1].tolist()


def test_the_end_of_an_answer_is_the_special_token_that_the_template_writes_behind_it():
    bytes_of = load_tokenizer("bytes")
    for source, end in ((BUILT_IN["plain"][0], 256), (MARKED, None)):
        template = ChatTemplate(source, "template", {"eos_token": bytes_of.end_of_document})
        encoder = ChatEncoder(template, bytes_of, only_last=True)
        assert encoder.end_of_answer([USER]) == end


def encoder(source: str) -> ChatEncoder:
    return ChatEncoder(
        ChatTemplate(source, "the template", {"eos_token": ""}), load_tokenizer("bytes"), only_last=True
    )


def test_a_null_field_is_an_absent_one():
    record = {"messages": None, "prompt": "q", "response": "a", "completion": None, "system": None}
    ((ids, _),) = encoder(BUILT_IN["plain"][0]).conversations(record, "chat")
    assert bytes(ids.tolist()).decode() == "user: q\nassistant: a"


def test_a_pair_that_the_template_makes_equal_is_refused():
    trims = encoder("{% for m in messages %}{{ m.content|trim }}.{% endfor %}")
    with pytest.raises(BadRecord, match="are equal once the template has rendered them"):
        trims.conversations({"prompt": "q", "chosen": "a", "rejected": "a "}, "preference")


def test_half_a_surrogate_pair_beside_the_content_becomes_a_question_mark():
    named = encoder("{% for m in messages %}{{ m.content + m.name }}.{% endfor %}")
    messages = [{**USER, "name": ""}, {**ASSISTANT, "name": "\ud800"}]
    ((ids, _),) = named.conversations({"messages": messages}, "chat")
    assert bytes(ids.tolist()) == b"q.a?."


@pytest.mark.parametrize("character", ["\ue000", "\ue001", "\ue002"])
def test_characters_that_mark_places_while_a_text_is_rendered_are_refused(character):
    template = ChatTemplate(BUILT_IN["plain"][0], "plain", {"eos_token": "."})
    encoder = ChatEncoder(template, load_tokenizer("bytes"), only_last=False)
    messages = [{"role": "user", "content": f"a{character}b"}, {"role": "assistant", "content": "c"}]
    with pytest.raises(BadInput, match=rf"U\+{ord(character):04X}: remove it"):
        encoder.encode(messages)
