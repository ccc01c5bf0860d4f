"""What the whole road learns from holds nothing that it is asked, and near misses are wrong."""

import json
from random import Random

import pytest

from llada_megatron.demo import questions
from llada_megatron.tasks import reasoning
from llada_megatron.tasks.data_packages import FOLDER

FEW = {
    name: questions.Questions(each.generator, each.settings, learnt=60, tried=8)
    for name, each in questions.TASKS.items()
}


@pytest.mark.parametrize("answer", ["aa", "eno", "oo", "nogo"])
def test_a_near_miss_is_wrong_and_near(answer):
    for seed in range(20):
        missed = questions.near_miss(answer, Random(seed))
        assert missed != answer
        assert sorted(missed) == sorted(answer) or missed[:-1] == answer


@pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the packages that `make eval-data` installs")
def test_what_is_asked_is_not_learnt(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "TASKS", FEW)
    talk = [("Hello.", "Hi.")]
    monkeypatch.setattr(questions.conversations, "distinct", lambda files: talk)
    monkeypatch.setattr(questions.conversations, "yaml_files", lambda command: [])
    counts = questions.write(tmp_path)
    lines = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in counts
    }
    assert {name: len(each) for name, each in lines.items()} == counts
    assert counts["text"] == counts["chats"] > 100 and counts["tries"] == 16
    learnt = {record["messages"][0]["content"] for record in lines["chats"]}
    learnt |= {record["messages"][0]["content"] for record in lines["tries"]}
    for each in FEW.values():
        asked = reasoning.documents(generator=each.generator, size=questions.ASKED, settings=each.settings)[
            "test"
        ]
        assert len(asked) == questions.ASKED and not {item["question"] for item in asked} & learnt
    assert {
        "messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    } in lines["chats"]
    before = (tmp_path / "chats.jsonl").read_bytes()
    questions.write(tmp_path)
    assert (tmp_path / "chats.jsonl").read_bytes() == before


def test_a_pair_is_a_right_answer_and_the_models_mistake(tmp_path, monkeypatch):
    """Nothing said is no mistake; a few near misses of right answers make them up."""
    tried = [("cat", "tac", "tac"), ("dog", "god", "gad"), ("sun", "nus", " "), ("low", "wol", "wol")]
    lines = [
        json.dumps({"messages": [{"role": "user", "content": question}], "answer": answer, "text": text})
        for question, answer, text in tried
    ]
    (tmp_path / "tried.jsonl").write_text("\n".join(lines))
    for least, questions_of_pairs in ((0, ["dog"]), (2, ["dog", "cat"]), (9, ["dog", "cat", "low"])):
        monkeypatch.setattr(questions, "LEAST_PAIRS", least)
        counts = questions.write_pairs(tmp_path / "tried.jsonl", tmp_path / "pairs.jsonl")
        pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
        assert [pair["prompt"] for pair in pairs] == questions_of_pairs
        assert counts == {"mistakes": 1, "near misses": len(pairs) - 1}
        assert pairs[0] == {"prompt": "dog", "chosen": "god", "rejected": "gad"}
        assert all(pair["rejected"] != pair["chosen"] for pair in pairs)
