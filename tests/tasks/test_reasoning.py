"""reasoning-gym's items: right answers score 1, wrong ones less, and nothing that was generated runs."""

import functools
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.harness import tasks
from llada_megatron.tasks import reasoning
from llada_megatron.tasks.data_packages import FOLDER
from tests.tasks.loaded import load

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="needs the packages that `make eval-data` installs"
)

FILES = Path(reasoning.__file__).parent / "reasoning_gym"
WITHOUT_GOLD = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Their items have a checker and no answer."""


def items(generator: str, size: int = 2, **rest: Any) -> list[dict[str, Any]]:
    return reasoning.documents(generator=generator, size=size, **rest)["test"].to_list()


def scores(doc: dict[str, Any], text: str) -> dict[str, float]:
    return reasoning.process_results(doc, [text])


def another(answer: str) -> str:
    """A near miss: the last digit or letter is the next one."""
    return answer[:-1] + chr(ord(answer[-1]) + (-1 if answer[-1] in "9z" else 1))


@pytest.fixture
def drawn_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is about scores: items are not drawn in a process for each generator, which takes seconds."""
    monkeypatch.setattr(reasoning, "FEWSHOT", 0)
    monkeypatch.setattr(reasoning, "_draw", functools.cache(reasoning.draw_items))


@pytest.mark.parametrize("name", ["chain_sum", "word_sorting"])
def test_right_answers_score_one_and_near_misses_less(name: str, drawn_here: None) -> None:
    for doc in items(name, 20):
        assert scores(doc, doc["answer"]) == {"acc": 1.0, "score": 1.0}
        assert scores(doc, another(doc["answer"]))["acc"] == 0.0
        assert scores(doc, "")["acc"] == 0.0


def test_right_answers_of_every_generator_score_one_and_others_less(drawn_here: None) -> None:
    for name in reasoning.generators():
        for doc in items(name, 1):
            if name not in WITHOUT_GOLD:
                assert scores(doc, doc["answer"]) == {"acc": 1.0, "score": 1.0}, name
            if name == "game_of_life_halting":  # its scorer takes whatever is not "True" for "False"
                continue
            assert scores(doc, "?")["acc"] == 0.0, name
            assert scores(doc, "")["acc"] == 0.0, name


def test_the_answer_is_what_stands_in_the_last_tags_or_everything() -> None:
    assert reasoning.answer_in(" 12\n") == "12"
    assert reasoning.answer_in("<answer>3</answer> no: <answer>\n4\n</answer> then") == "4"
    assert reasoning.answer_in("<answer>3") == "<answer>3"


@pytest.mark.slow
def test_items_are_the_same_in_a_process_that_hashes_strings_differently() -> None:
    code = (
        "from llada_megatron.tasks.reasoning import documents\n"
        "print([row['question'] for row in documents(generator='isomorphic_strings', size=3)['test']])"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1


def test_examples_of_a_prompt_are_none_of_the_asked_items() -> None:
    splits = reasoning.documents(generator="chain_sum")
    assert len(splits["test"]) == reasoning.SIZE
    assert len(splits["fewshot"]) == reasoning.FEWSHOT
    assert not {*splits["test"]["question"]} & {*splits["fewshot"]["question"]}


def test_settings_of_a_generator_can_be_chosen_and_wrong_ones_are_refused() -> None:
    (doc, *_) = items("chain_sum", settings={"min_terms": 5, "max_terms": 5})
    assert doc["question"].count("+") + doc["question"].count("-") == 4
    with pytest.raises(BadInput, match=r"chain_sum refuses its settings .*terms"):
        items("chain_sum", settings={"terms": 5})
    with pytest.raises(BadInput, match=r"no generator 'chainsum': take one of .*chain_sum"):
        items("chainsum")


def test_every_generator_is_a_task_of_its_name() -> None:
    named = {name for name in tasks.names() if name.startswith("reasoning_gym:")}
    assert named == {f"reasoning_gym:{name}" for name in reasoning.generators()}
    for name in reasoning.generators():
        assert f"{{generator: {name}}}" in (FILES / f"{name}.yaml").read_text()


def test_a_task_asks_the_question_alone_or_after_examples_and_scores_as_its_generator() -> None:
    (task,) = load("reasoning_gym:chain_sum").values()
    doc = task.test_docs()[0]
    assert len(task.test_docs()) == reasoning.SIZE
    assert task.fewshot_context(doc, num_fewshot=0) == doc["question"]
    examples = task.fewshot_context(doc, num_fewshot=2).split("\n\n\n")
    assert [example.count("\n") for example in examples] == [1, 1, 0]
    assert task.process_results(doc, [f" {doc['answer']}\n"]) == {"acc": 1.0, "score": 1.0}
    assert {*task.aggregation()} == {"acc", "score"}


def test_the_page_on_tasks_has_a_file_for_another_length_and_seed_that_works(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "long_sums.yaml").write_text(example)
    (task,) = load("long_sums", folder=tmp_path).values()
    docs = task.test_docs()
    assert len(docs) == 50
    assert docs[0]["question"].count("+") + docs[0]["question"].count(" - ") == 7
    assert task.process_results(docs[0], [docs[0]["answer"]])["acc"] == 1.0


def test_the_names_of_scorers_that_evaluate_answers_are_complete() -> None:
    datasets = reasoning._package().DATASETS
    sources = {name: inspect.getsource(datasets[name][0].score_answer) for name in reasoning.generators()}
    assert {name for name, source in sources.items() if "eval(answer" in source} == reasoning.EVALUATED
    assert {name for name, source in sources.items() if "parse_expr(answer" in source} == reasoning.PARSED


@pytest.mark.parametrize(
    "name",
    [
        "string_insertion",
        "countdown",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in sorted(reasoning.EVALUATED | reasoning.PARSED)
            if name not in ("string_insertion", "countdown")
        ),
    ],
)
def test_a_generated_answer_is_scored_and_not_executed(name: str, tmp_path: Path, drawn_here: None) -> None:
    (doc, *_) = items(name, 1)
    assert scores(doc, doc["answer"])["acc"] == 1.0
    mark = tmp_path / "executed"
    for hostile in (
        f"open({str(mark)!r}, 'w')",
        f"[open({str(mark)!r}, 'w')]",
        f"Symbol(open({str(mark)!r}, 'w'))",
    ):
        assert scores(doc, hostile)["acc"] == 0.0
    assert not mark.exists()


@pytest.mark.parametrize(
    "formula",
    [
        "9**9**9**9",
        "((9**99)**99)**99",
        "10**(10*10)",
        "x.diff(x)",
        "[1]*10",
        "exp(1, 2)",
        "Symbol('x')",
        "9!",
        "1; 2",
    ],
)
def test_what_is_no_small_formula_is_not_parsed(formula: str) -> None:
    assert not reasoning.is_formula(formula)


@pytest.mark.parametrize("formula", ["6*(5 - 9 + 8)", "x**3/3 - 2*exp(x)*sin(2*x) + C", "x**(1/2)", "-x**-2"])
def test_what_integrals_and_puzzles_need_is_a_formula(formula: str) -> None:
    assert reasoning.is_formula(formula)
