"""What docs/results/levenshtein.md is measured with: faults are what they are called, distances are right."""

import json
from random import Random

import pytest

from tests.objectives import mending


@pytest.mark.parametrize(
    ("fault", "longer", "away"),
    [("none", 0, 0), ("substituted", 0, 1), ("inserted", 1, 1), ("deleted", -1, 1)],
)
def test_a_fault_is_one_edit_of_its_kind(fault, longer, away):
    for seed in range(50):
        text = mending.spoiled("abcdabcd", fault, Random(seed))
        assert (len(text) - 8, mending.distance(text, "abcdabcd")) == (longer, away)


def test_the_distance_is_the_least_number_of_edits():
    for one, other, edits in (("kitten", "sitting", 3), ("", "ab", 2), ("abc", "", 3), ("ab", "ba", 2)):
        assert mending.distance(one, other) == edits == mending.distance(other, one)


def test_what_is_asked_is_not_learnt_and_scores_are_of_each_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(mending, "LEARNT", 30)
    monkeypatch.setattr(mending, "ASKED", 4)
    mending.write(tmp_path)
    chats, drafts = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("chats", "drafts")
    )
    learnt = {chat["messages"][0]["content"] for chat in chats}
    asked = {draft["messages"][0]["content"] for draft in drafts}
    assert len(learnt) == 30 and len(asked) == 4 and not learnt & asked
    results = tmp_path / "results.jsonl"
    said = [draft | {"text": draft["answer"], "forwards": {"denoise": 2}} for draft in drafts]
    said[-1]["text"] += "x"
    results.write_text("".join(json.dumps(each) + "\n" for each in said))
    *_, inserted, _, mixed = mending.score(results).splitlines()
    assert "right   0.0 -> 100.0 %   distance 1.00 -> 0.00   2.00 forwards" in inserted
    assert "->  75.0 %" in mixed and "-> 0.25 " in mixed
    questions = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert (
        {each["messages"][0]["content"] for each in questions} == asked == {q["question"] for q in questions}
    )
    said = [q | {"text": q["answer"], "tokens": [1, 2, 3], "forwards": {"denoise": 2}} for q in questions]
    said[0]["text"] = ""
    results.write_text("".join(json.dumps(each) + "\n" for each in said))
    assert "right 75.0 ± 21.7 %   1.50 tokens a forward" in mending.score(results)
