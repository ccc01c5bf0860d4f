"""Answers to lm-eval's results: what was answered is what is scored, under its decoding, with its cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.harness import tasks
from llada_megatron.harness.asking import Wording, requests_of
from llada_megatron.harness.requests import GENERATE, GREEDY
from llada_megatron.harness.results import SHOWN, results_of
from tests.harness.questions import CHOOSES, CONTINUES, GENERATES, QUESTIONS, ROLLS, folder_of
from tests.harness.test_asking import offline, wording  # noqa: F401 - an autouse fixture

COST = {"forwards": {"prefill": 1, "denoise": 3, "store": 0}, "spent_sec": 0.5, "spent_forwards": 2}
DECODINGS = ("slow", "fast")


def answers_to(made: Wording, loaded: dict[str, Any]) -> list[dict[str, Any]]:
    """Right choices have more nats, last words are greedy for even questions, `slow` texts are right."""
    texts, scores = requests_of(loaded["tasks"], made, limit=None)
    found = []
    for score in scores:
        said = bytes(score.continuation).decode().strip()
        is_right = any(said == question["choices"][question["label"]] for question in QUESTIONS)
        about = {"decoding": "", "task": score.task, "number": score.number, "digest": score.digest}
        found.append(
            {**about, "kind": score.kind, "nats": -1.0 if is_right else -2.0, "se": 0.1, "spent_sec": 1}
        )
        if score.wants_greedy:
            is_greedy = score.number % 2 == 0
            found.append({**about, "kind": GREEDY, "is_greedy": is_greedy, "spent_sec": 1})
    for decoding in DECODINGS:
        for text in texts:
            answer = QUESTIONS[text.number]["answer"] if decoding == "slow" else "no"
            about = {"decoding": decoding, "task": text.task, "number": text.number, "digest": text.digest}
            said = {"kind": GENERATE, "text": answer, "tokens": [104, 105, 1, 1, 1, 1], "stop": "length"}
            said |= {"decided_at": [1, 2, 2, 2, 2, 2], "edited": [1]}
            found.append({**about, **said, **COST})
    return found


def results(folder: Path, decoding: str, **changes: Any) -> dict[str, Any]:
    made = wording()
    loaded = tasks.load([*changes.pop("names")], [folder], fewshot=None)
    answers = [{**each, **changes} for each in answers_to(made, loaded)]
    said = {"name": decoding, "rule": "threshold", "settings": {}}
    model = {"checkpoint": "runs/x"}
    found = results_of(loaded, answers, said, made, limit=None, model=model, allows_code=False)
    assert json.loads(json.dumps(found)) == found
    return found


def test_answers_are_scored_under_their_decoding_with_their_cost(tmp_path):
    kinds = {"writes": GENERATES, "chooses": CHOOSES, "continues": CONTINUES, "rolls": ROLLS}
    folder = folder_of(tmp_path, **kinds)
    slow, fast = (results(folder, decoding, names=kinds) for decoding in DECODINGS)
    assert [each["results"]["writes"]["exact_match,none"] for each in (slow, fast)] == [1.0, 0.0]
    for found in (slow, fast):
        assert found["results"]["chooses"]["acc,none"] == 1.0
        assert found["results"]["continues"]["acc,none"] == 0.5
        assert found["llada"]["decoding"]["name"] in DECODINGS
    cost = slow["llada"]["cost"]
    assert cost["writes"] == {
        "texts": 4,
        "tokens": 24,
        "tokens_per_forward": 2.0,
        "forwards": {"prefill": 4, "denoise": 12, "store": 0},
        "batched_forwards": 8,
        "ms_per_forward": 250.0,
        "tokens_per_second": 12.0,
        "seconds": 2.0,
        "stops": {"length": 4},
    }
    assert [len(each) for each in slow["llada"]["shown"].values()] == [SHOWN, 0, 0, 0]
    first = slow["llada"]["shown"]["writes"][0]
    assert first["question"] == slow["samples"]["writes"][0]["arguments"][0][0]
    assert first["target"] == "sat" and first["scores"] == {"exact_match": 1.0}
    assert first["pieces"][:2] == ["h", "i"] and first["decided_at"] == [1, 2, 2, 2, 2, 2]
    assert first["is_edited"] == [False, True, False, False, False, False]
    assert cost["continues"] == {"likelihoods": 4, "likelihood_seconds": 8, "nats_se": pytest.approx(0.1)}
    assert len(slow["samples"]["chooses"]) == 4 and slow["samples"]["writes"][0]["resps"] == [["sat"]]


def test_questions_that_are_others_each_time_are_refused(tmp_path):
    folder = folder_of(tmp_path, writes=GENERATES)
    with pytest.raises(BadInput, match="Task writes asks something else each time"):
        results(folder, "slow", names=["writes"], digest="another")
    with pytest.raises(BadInput, match="writes is not scored: "):
        results(folder, "slow", names=["writes"], text=None)
