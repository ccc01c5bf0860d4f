"""HumanEval as lm-eval runs it: canonical solutions pass, in whatever form an answer has; others do not."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.tasks import code_execution, humaneval
from llada_megatron.tasks.data_packages import FOLDER
from tests.tasks.loaded import load

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="needs the packages that `make eval-data` installs"
)


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(code_execution, "_allowed", True)
    yield


def passed(problem: dict[str, str], text: str) -> bool:
    return humaneval.process_results(problem, [text]) == {"pass@1": 1.0}


def corrupted(problem: dict[str, str]) -> str:
    """The canonical solution, which is not reached."""
    return "    return NotImplemented\n" + problem["canonical_solution"]


def test_the_task_is_refused_before_anything_is_generated_unless_code_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(code_execution, "_allowed", False)
    with pytest.raises(BadInput, match="allow it with --allow-code"):
        load("humaneval")


def test_a_completion_is_scored_through_the_task(allowed: None) -> None:
    tasks = load("humaneval", "humaneval_chat")
    task = tasks["humaneval"]
    assert task.UNSAFE_CODE
    docs = list(task.test_docs())
    assert len(docs) == 164
    assert task.fewshot_context(docs[3], num_fewshot=0) == docs[3]["prompt"]
    for doc in docs[:3]:
        assert task.process_results(doc, [doc["canonical_solution"]]) == {"pass@1": 1.0}
        assert task.process_results(doc, [corrupted(doc)]) == {"pass@1": 0.0}
    asked = tasks["humaneval_chat"].fewshot_context(docs[0], num_fewshot=0)
    assert docs[0]["prompt"] in asked
    assert asked.endswith("```")


def test_a_function_may_come_whole_in_a_block_of_code_or_cut_off_after_it() -> None:
    problem = humaneval.problems()[32]  # its prompt has a function that the solution calls
    whole = problem["prompt"] + problem["canonical_solution"]
    assert passed(problem, problem["canonical_solution"])
    assert passed(problem, whole)
    assert passed(problem, f"Here it is:\n\n```python\n{whole}```\n\nIt bisects.\n```\nfind_zero()\n```")
    assert passed(problem, f"```\n{whole}")
    body = problem["canonical_solution"]
    alone = f"import math\n\ndef find_zero(xs: list):\n{body}"
    assert passed(problem, f"```py\n{alone}\n```")  # without the other function, which the prompt has
    assert not passed(problem, f"```python\n{problem['prompt']}    pass\n```")
    assert not passed(problem, "I cannot do that.")
    assert not passed(problem, "")


def those_that_pass(problems: list[dict[str, str]], text_of: Callable[[dict[str, str]], str]) -> list[str]:
    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(lambda problem: passed(problem, text_of(problem)), problems)]
    return [problem["task_id"] for problem, good in zip(problems, found, strict=True) if good]


@pytest.mark.slow
def test_all_164_canonical_solutions_pass() -> None:
    problems = humaneval.problems()
    assert len(problems) == 164
    right = those_that_pass(problems, lambda problem: problem["canonical_solution"])
    assert right == [problem["task_id"] for problem in problems]


@pytest.mark.parametrize(
    "every",
    [pytest.param(8, marks=pytest.mark.slow, id="of 8"), pytest.param(1, marks=pytest.mark.full, id="all")],
)
def test_no_corrupted_solution_passes(every: int) -> None:
    assert those_that_pass(humaneval.problems()[::every], corrupted) == []
