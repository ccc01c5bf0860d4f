"""Templates of others: what is rendered, and which of it is an answer."""

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.data.chat_template import BUILT_IN, ChatTemplate

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
