"""Templates of others: what is rendered, and which of it is an answer."""

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.data.chat_template import BUILT_IN, ChatTemplate, load_template
from llada_megatron.data.tokenizer import load_tokenizer
from tests.foreign.conversations import make_tokenizer

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": " four "},
]
CHATML = """{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content|trim + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
MARKED = """{%- for m in messages %}
{%- if m.role == 'assistant' %}A:{% generation %}{{ m.content }}<end>{% endgeneration %}
{%- else %}{{ m.role }}:{{ m.content }};{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}A:{% endif %}"""
FORGETS = """{%- for m in messages %}
{%- if m.role == 'assistant' and not loop.last %}A:{{ m.content.split('</think>')[-1] }}<end>
{%- elif m.role == 'assistant' %}A:{{ m.content }}<end>
{%- else %}U:{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"""


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, "the template", VARIABLES)


def answers(source: str, **options) -> list[str]:
    return [span.text for span in template(source).spans(CHAT, **options) if span.is_answer]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, ["two<|im_end|>\n", "four<|im_end|>\n"]),
        (MARKED, ["two<end>", " four <end>"]),
        (BUILT_IN["llada2"][0], ["two<|role_end|>", " four <|role_end|>"]),
        (BUILT_IN["plain"][0], ["two</s>", " four </s>"]),
    ],
)
def test_answers_are_what_follows_the_generation_prompt(source, expected):
    assert answers(source) == expected
    assert answers(source, only_last=True) == expected[1:]
    spans = template(source).spans(CHAT)
    assert "".join(span.text for span in spans) == template(source).render(CHAT)
    assert [span.role for span in spans if span.is_answer] == ["assistant"] * 2
    assert {span.role for span in spans} == {"system", "user", "assistant"}


def test_llada2_renders_as_its_model_card_shows():
    turns = [{"role": "user", "content": "hi"}]
    rendered = template(BUILT_IN["llada2"][0]).render(turns, add_generation_prompt=True)
    assert rendered == (
        "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>hi<|role_end|>"
        "<role>ASSISTANT</role>"
    )


def test_what_follows_the_last_answer_is_left_out():
    cut = template(CHATML).spans([*CHAT, {"role": "user", "content": "never answered"}])
    assert cut == template(CHATML).spans(CHAT)


def test_a_template_that_renders_earlier_turns_otherwise_supervises_the_last_alone():
    chat = [
        {**m, "content": f"<think>..</think>{m['content']}"} if m["role"] == "assistant" else m for m in CHAT
    ]
    with pytest.raises(BadInput, match="message 3 otherwise once others follow it"):
        template(FORGETS).spans(chat)
    last = [span.text for span in template(FORGETS).spans(chat, only_last=True) if span.is_answer]
    assert last == ["<think>..</think> four <end>"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}", "drops the answer"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' * 2**40 }}", "a result of \\* in it is too large"),
        ("{{ 9 ** 99999999 }}", "a result of \\*\\* in it is too large"),
        ("{{ raise_exception('a\\nb ' ~ 'c' * 999) }}", "cannot render it: a b c{296}\\.\\.\\.$"),
        ("{% generation %}{% generation %}a{% endgeneration %}{% endgeneration %}", "inside another"),
    ],
)
def test_what_a_template_says_against_a_chat_is_a_sentence(source, reason):
    with pytest.raises(BadInput, match=reason):
        template(source).spans(CHAT)


def test_a_chat_without_an_answer_and_a_source_without_sense_are_refused():
    with pytest.raises(BadInput, match="assistant"):
        template(CHATML).spans(CHAT[:2])
    with pytest.raises(BadInput, match="not a Jinja template"):
        template("{% if %}")


def test_marks_around_earlier_answers_alone_are_no_last_answer():
    marks_first = template("{% generation %}two{% endgeneration %}{{ messages|length }}")
    with pytest.raises(BadInput, match=r"no {% generation %} around the last answer"):
        marks_first.spans(CHAT, only_last=True)


def test_a_conversation_may_begin_with_an_answer():
    chat = [{"role": "assistant", "content": "hi"}]
    (learnt,) = [span.text for span in template(BUILT_IN["llada2"][0]).spans(chat) if span.is_answer]
    assert learnt == "hi<|role_end|>"


def test_marks_are_tokens_of_the_tokenizer_and_not_what_stands_for_the_unknown(tmp_path):
    make_tokenizer(tmp_path)
    name = f"{tmp_path}/tokenizer.json"
    with pytest.raises(BadInput, match=r"holds neither chat_template\.jinja nor tokenizer_config\.json"):
        load_template(None, name, load_tokenizer(name))
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert load_template(None, name, load_tokenizer(name)).where == f"{tmp_path}/chat_template.jinja"
    with pytest.raises(BadInput, match="writes <role>, which is no token of"):
        load_template("llada2", name, load_tokenizer(name))
    with pytest.raises(BadInput, match="writes <role>, which is no token of bytes"):
        load_template("llada2", "bytes", load_tokenizer("bytes"))
