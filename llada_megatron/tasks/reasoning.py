"""Items of reasoning-gym's generators (Stojanovski et al., arXiv 2505.24760; Apache-2.0), and their scores.

Most generators draw item i of seed s from Random(s + i), so two seeds that are close share items. Ours are
far from any seed that training would begin with (`SEED`).
"""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

from llada_megatron.config.errors import BadInput
from llada_megatron.tasks.data_packages import dataset, folder_of

if TYPE_CHECKING:
    from datasets import Dataset

SIZE = 200
SEED = 1_000_000_000
"""Of the first item; training data from seeds between 0 and SEED - its size shares no item with a task."""
FEWSHOT = 16
"""Items for few-shot prompts: those that follow the asked ones."""

DRAWN = ("generator", "size", "seed", "settings")
"""What of an item says which list of items it belongs to."""

EVALUATED = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
"""Generators whose scorers hand an answer to `eval`."""
PARSED = {
    "countdown",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
}
"""Generators whose scorers hand an answer to sympy's `parse_expr`, which ends in `eval` too."""
FUNCTIONS = {"exp", "log", "ln", "sqrt", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
MAX_FORMULA = 500
MAX_POWER = 1000


@cache
def generators() -> tuple[str, ...]:
    """The names of all generators but `composite`, which mixes others; BadInput without the package."""
    return tuple(sorted({*_package().DATASETS} - {"composite"}))


def documents(
    *, generator: str, size: int = SIZE, seed: int = SEED, settings: dict[str, Any] | None = None, **_: Any
) -> dict[str, Dataset]:
    """The splits `test`, `size` items from seed on, and `fewshot`, the items after them.

    settings: of the generator, such as how many terms a sum has; its own where it is None. Raises BadInput
    for a setting that it refuses.
    """
    drawn = (generator, size + FEWSHOT, seed, json.dumps(settings or {}, sort_keys=True))
    _, entries = _draw(*drawn)
    items = [
        {"question": entry["question"], "answer": str(entry["answer"] or ""), "index": index}
        | dict(zip(DRAWN, drawn, strict=True))
        for index, entry in enumerate(entries)
    ]
    return dataset(test=items[:size], fewshot=items[size:])


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`score`: the generator's own, 0 to 1; `acc`: whether it is 1."""
    score = score_answer(doc, answer_in(results[0]))
    return {"acc": float(score == 1.0), "score": score}


def answer_in(text: str) -> str:
    """What stands in the last <answer> ... </answer> of a text, or all of it; without space around."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    return (tagged[-1] if tagged else text).strip()


def score_answer(doc: dict[str, Any], answer: str) -> float:
    """The generator's score of an answer to an item, 0 to 1; 0 where it cannot make anything of it."""
    name = doc["generator"]
    # The scorer wants the item as it was drawn, tuples and numbers included, which no data set keeps.
    source, entries = _draw(*(doc[key] for key in DRAWN))
    entry = entries[doc["index"]]
    if answer != entry["answer"] and (
        (name in EVALUATED and not is_literal_or_text(answer)) or (name in PARSED and not is_formula(answer))
    ):
        return 0.0
    try:
        with warnings.catch_warnings(action="ignore"):
            return float(source.score_answer(answer, entry))
    except Exception:  # whatever a scorer meets in a text that it was not written for
        logging.getLogger(__name__).debug("%s cannot score %r", name, answer, exc_info=True)
        return 0.0


def is_literal_or_text(answer: str) -> bool:
    """Whether `eval` would make numbers, words and lists of it, or nothing: no call, name or arithmetic."""
    try:
        ast.literal_eval(answer)
    except SyntaxError:  # eval's answer too, before anything runs
        return True
    except (ValueError, TypeError, MemoryError, RecursionError):
        return False
    return True


def is_formula(answer: str) -> bool:
    """Whether it is arithmetic with names, small powers and the functions of FUNCTIONS, and nothing else."""
    if len(answer) > MAX_FORMULA:
        return False
    try:
        nodes = [*ast.walk(ast.parse(answer, mode="eval").body)]
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    power = 1.0
    for node in nodes:
        match node:
            case ast.BinOp(op=ast.Pow(), right=exponent):
                size = _size_of(exponent)
                if size is None:
                    return False
                power *= max(size, 1.0)
            case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div()) | ast.UnaryOp():
                pass
            case ast.Call(func=ast.Name(id=name), args=[_], keywords=[]) if name in FUNCTIONS:
                pass
            case ast.Constant(value=int() | float()) | ast.Name() | ast.operator() | ast.unaryop():
                pass
            case ast.expr_context():
                pass
            case _:
                return False
    return power <= MAX_POWER


def _size_of(exponent: ast.expr) -> float | None:
    """|a| or |a / b| of numbers; None for anything else."""
    match exponent:
        case ast.Constant(value=int() | float() as value):
            return abs(value)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _size_of(operand)
        case ast.BinOp(left=left, op=ast.Div(), right=ast.Constant(value=int() | float() as below)) if below:
            above = _size_of(left)
            return None if above is None else above / abs(below)
    return None


@cache
def _draw(generator: str, size: int, seed: int, settings: str) -> tuple[Any, list[dict[str, Any]]]:
    """The generator and its items, the same in every process; drawing one can take a second."""
    if generator not in generators():
        raise BadInput(
            f"reasoning-gym has no generator '{generator}': take one of {', '.join(generators())}."
        )
    try:
        source = _package().create_dataset(generator, size=size, seed=seed, **json.loads(settings))
    except (TypeError, AssertionError, ValueError) as error:
        raise BadInput(f"reasoning-gym's {generator} refuses its settings {settings}: {error}.") from None
    # Some generators go through a set of words: other items in each process, unless strings hash alike.
    drawn = subprocess.run(
        [sys.executable, "-m", __name__, generator, str(size), str(seed), settings],
        env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return source, pickle.loads(drawn.stdout)


def draw_items(generator: str, size: int, seed: int, settings: str) -> tuple[Any, list[dict[str, Any]]]:
    """The generator and its items as this process draws them."""
    source = _package().create_dataset(generator, size=size, seed=seed, **json.loads(settings))
    return source, [source[index] for index in range(size)]


def _print_items(generator: str, size: str, seed: str, settings: str) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # a few generators print
        _, items = draw_items(generator, int(size), int(seed), settings)
    sys.stdout.buffer.write(pickle.dumps(items))


def _package() -> Any:
    folder_of("reasoning_gym", distribution="reasoning-gym")
    from reasoning_gym import factory  # matplotlib and sympy come with it, in about a second

    return factory


if __name__ == "__main__":
    _print_items(*sys.argv[1:])
