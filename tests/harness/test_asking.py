"""What lm-eval asks in text, in tokens: prompts, pairs, chats, and the settings of a task's texts."""

from __future__ import annotations

from typing import Any

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.data.chat import ChatEncoder
from llada_megatron.data.chat_template import load_template
from llada_megatron.data.tokenizer import ByteTokenizer
from llada_megatron.harness import tasks
from llada_megatron.harness.asking import Wording, requests_of
from llada_megatron.harness.requests import Generation
from tests.harness.questions import CHOOSES, CONTINUES, GENERATES, ROLLS, folder_of

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module", autouse=True)
def offline() -> None:
    tasks.prepare()


def wording(*, chat: bool = False, context: int = 64, block_size: int = 4, **options: Any) -> Wording:
    encoder = None
    if chat:
        template = load_template("plain", "bytes", TOKENIZER)
        encoder = ChatEncoder(template, TOKENIZER, only_last=False)
    return Wording(TOKENIZER, encoder, context, block_size, **options)


def test_a_pair_is_tokenized_as_one_text_and_its_space_belongs_to_the_continuation():
    asked = wording()
    assert asked.pair("The cat \n", "sat") == (list(b"The cat"), list(b" \nsat"))
    assert asked.pair("The cat", " sat") == (list(b"The cat"), list(b" sat"))
    assert asked.pair("", "é") == ([], list("é".encode()))
    assert wording(chat=True).pair("", "<|endoftext|>") == ([], list(b"<|endoftext|>"))  # a text that says so
    assert wording(block_size=0).pair("", "a") == ([256], [97])  # something must predict the first token


def test_a_chats_tokens_are_those_of_llada_generate():
    asked = wording(chat=True)
    assert asked.encoder is not None
    history: Any = [{"role": "user", "content": "What is <|endoftext|>?"}]
    text = asked.chat(history)
    assert "What is <|endoftext|>?" in text
    assert asked.prompt(text) == asked.encoder.prompt(history) and 256 not in asked.prompt(text)
    assert asked.pair(text, " A") == (asked.encoder.prompt(history), [32, 65])
    begun = asked.chat([*history, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert begun == text + "It is" and asked.prompt(begun) == asked.prompt(text) + list(b"It is")


def asked_of(
    folder, made: Wording, *names: str, limit: float | None = None, fewshot: int | None = None
) -> Any:
    return requests_of(tasks.load(names, [folder], fewshot=fewshot)["tasks"], made, limit=limit)


def test_requests_are_numbered_by_task_and_a_limit_takes_the_first(tmp_path):
    folder = folder_of(
        tmp_path, chooses=CHOOSES, rolls=ROLLS, continues=CONTINUES, twice={**GENERATES, "repeats": 2}
    )
    texts, scores = asked_of(folder, wording(), "chooses", "rolls", "continues", "twice")
    assert [each.number for each in texts] == list(range(8)) and texts[0].tokens == texts[1].tokens
    numbers = {(each.task, each.number) for each in scores}
    assert numbers == {(t, n) for t, c in (("chooses", 9), ("rolls", 4), ("continues", 4)) for n in range(c)}
    assert {each.task for each in scores if each.wants_greedy} == {"continues"}  # whose acc reads it
    fewer = asked_of(folder, wording(), "continues", "chooses", limit=0.5)[1]
    assert fewer == [each for each in [*scores[13:15], *scores[:5]]]


def generation(tmp_path, made: Wording, **kwargs: Any) -> Generation:
    folder = folder_of(tmp_path, writes={**GENERATES, "generation_kwargs": kwargs})
    return asked_of(folder, made, "writes")[0][0]


def test_settings_of_texts_are_a_tasks_and_a_commands_go_before_them(tmp_path):
    found = generation(
        tmp_path, wording(strings=["z"]), until="\n", max_tokens=5, do_sample=False, temperature=1
    )
    assert (found.strings, found.new_tokens, found.sampling) == (("\n", "z"), 5, {})
    found = generation(
        tmp_path, wording(new_tokens=6), until=[], max_gen_toks=5, do_sample=True, temperature=0.5, top_p=0.9
    )
    assert (found.strings, found.new_tokens) == ((), 6)
    assert found.sampling == {"temperature": "0.5", "top_p": "0.9"}
    assert generation(tmp_path, wording(context=512), until=[]).new_tokens == 256
    with pytest.raises(BadInput, match="Task writes: its generation_kwargs hold num_beams=4, which decoding"):
        generation(tmp_path, wording(), until=[], num_beams=4, max_gen_toks=5)
    with pytest.raises(
        BadInput, match="Task writes: it asks for 256 new tokens, and the model's context is 64"
    ):
        generation(tmp_path, wording(), until=[])


def test_a_long_prompt_loses_its_beginning_and_is_counted(tmp_path):
    made = wording(context=18)
    texts, _ = asked_of(folder_of(tmp_path, writes=GENERATES), made, "writes")
    assert [bytes(each.tokens).decode() for each in texts[:3]] == ["The cat", "One two", " upon a"]  # 16 - 9
    assert made.cut == {"writes": 2}


def test_examples_come_before_a_question_and_are_the_same_each_time(tmp_path):
    shots = {"fewshot_split": "test", "fewshot_config": {"sampler": "default"}}
    folder = folder_of(tmp_path, writes={**GENERATES, **shots})
    loaded = tasks.load(["writes"], [folder], fewshot=2)["tasks"]
    first, second = (requests_of(loaded, wording(context=512), limit=None)[0] for _ in range(2))
    assert first == second
    assert bytes(first[0].tokens).decode().count("\n\n") == 2
    assert bytes(first[0].tokens).decode().endswith("\n\nThe cat")
