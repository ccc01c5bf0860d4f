"""What the whole road learns from holds nothing that it is asked, and near misses are wrong."""

import json
from random import Random

import pytest

from llada_megatron.demo import questions
from llada_megatron.tasks import reasoning
from llada_megatron.tasks.data_packages import FOLDER

FEW = {
    name: questions.Questions(each.generator, each.settings, learnt=60, preferred=8)
    for name, each in questions.TASKS.items()
    if name != "demo_long_words"
}


@pytest.mark.parametrize("answer", ["0", "-1", "10", "aa", "eno", "oo", "nogo"])
def test_a_near_miss_is_wrong_and_near(answer):
    for seed in range(20):
        missed = questions.near_miss(answer, Random(seed))
        assert missed != answer
        if answer.removeprefix("-").isdigit():
            assert abs(int(missed) - int(answer)) == 1
        else:
            assert sorted(missed) == sorted(answer) or missed[:-1] == answer


@pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the packages that `make eval-data` installs")
def test_what_is_asked_is_not_learnt(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "TASKS", FEW)
    talk = [("Hello.", "Hi.")]
    monkeypatch.setattr(questions.conversations, "distinct", lambda files: talk)
    monkeypatch.setattr(questions.conversations, "yaml_files", list)
    counts = questions.write(tmp_path)
    lines = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in counts
    }
    assert {name: len(each) for name, each in lines.items()} == counts
    assert counts["text"] == counts["chats"] > 100 and counts["pairs"] == 16
    learnt = {record["messages"][0]["content"] for record in lines["chats"]}
    learnt |= {record["prompt"] for record in lines["pairs"]}
    for each in FEW.values():
        asked = reasoning.documents(generator=each.generator, size=questions.ASKED, settings=each.settings)[
            "test"
        ]
        assert len(asked) == questions.ASKED and not {item["question"] for item in asked} & learnt
    assert {
        "messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    } in lines["chats"]
    assert all(record["chosen"] != record["rejected"] for record in lines["pairs"])
    before = (tmp_path / "chats.jsonl").read_bytes()
    questions.write(tmp_path)
    assert (tmp_path / "chats.jsonl").read_bytes() == before
