"""The small task of `make demo-chat`: questions that a program asks and scores, and conversations of people.

reasoning-gym's generator (Apache-2.0) asks for words spelt backwards: little enough for a model of a few
million parameters to learn in minutes, and each answer is right or wrong. What the model is scored on is
drawn from other seeds than what it learns, and its questions are left out of that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from llada_megatron.demo import conversations
from llada_megatron.record.json_files import write_json_lines
from llada_megatron.tasks import FOLDER, reasoning

ASKED = 200
"""Questions of each task."""
LONGEST = 24
"""Tokens of an answer, at most: bytes, and the mark of its end."""


@dataclass(frozen=True)
class Questions:
    """What one generator asks."""

    generator: str
    settings: dict[str, Any]
    learnt: int
    """Items drawn to learn from; what is asked is left out."""
    tried: int
    """Items drawn after them, whose answers a model tries, for pairs of a right answer and a wrong one."""


TASKS = {
    "demo_words": Questions(
        "spell_backward", {"min_word_len": 3, "max_word_len": 5}, learnt=8000, tried=1500
    ),
    "demo_long_words": Questions(
        "spell_backward", {"min_word_len": 6, "max_word_len": 8}, learnt=6000, tried=1500
    ),
}
LEAST_PAIRS = 200
"""Where a model makes fewer mistakes, near misses make them up."""


def write(folder: Path, *, divisor: int = 1) -> dict[str, int]:
    """Write text.jsonl, chats.jsonl, tries.jsonl, and a folder `tasks` for `llada eval`; returns how many
    lines each file has.

    The order of lines is mixed, and the same each time. divisor: of the items that are drawn.
    """
    random = Random(0)
    talk = conversations.distinct(conversations.yaml_files("make demo-chat"))
    chats = [conversations.as_messages(turns) for turns in talk]
    texts = [{"text": "\n".join(turns)} for turns in talk]
    tries = []
    for name, questions in TASKS.items():
        tried = max(1, questions.tried // divisor)
        drawn = list(_drawn(questions, questions.learnt // divisor + tried))
        for question, answer in drawn[:-tried]:
            chats.append(conversations.as_messages((question, answer)))
            texts.append({"text": f"{question}\n{answer}"})
        for question, answer in drawn[-tried:]:
            tries.append({"messages": [{"role": "user", "content": question}], "answer": answer})
        _write_task(folder / "tasks" / f"{name}.yaml", name, questions)
    counts = {}
    for name, records in (("text", texts), ("chats", chats), ("tries", tries)):
        random.shuffle(records)
        write_json_lines(folder / f"{name}.jsonl", records)
        counts[name] = len(records)
    return counts


def write_pairs(tried: Path, pairs: Path) -> dict[str, int]:
    """From what `llada generate` made of tries.jsonl: right answers, each before the wrong one that the model
    gave; near misses of answers that it gave right, up to LEAST_PAIRS. Returns how many there are of both.
    """
    random = Random(1)
    tries = [json.loads(line) for line in tried.read_text(encoding="utf-8").splitlines()]
    said = [(each["messages"][0]["content"], each["answer"], each["text"].strip()) for each in tries]
    mistakes = [each for each in said if each[2] and each[2] != each[1]]
    right = [each for each in said if each[2] == each[1]][: max(0, LEAST_PAIRS - len(mistakes))]
    misses = [(question, answer, near_miss(answer, random)) for question, answer, _ in right]
    names = ("prompt", "chosen", "rejected")
    write_json_lines(pairs, [dict(zip(names, pair, strict=True)) for pair in mistakes + misses])
    return {"mistakes": len(mistakes), "near misses": len(misses)}


def near_miss(answer: str, random: Random) -> str:
    """A wrong answer that is almost right: two neighbouring letters in each other's place."""
    places = [place for place in range(len(answer) - 1) if answer[place] != answer[place + 1]]
    if not places:
        return answer + answer[-1:]
    place = random.choice(places)
    return answer[:place] + answer[place + 1] + answer[place] + answer[place + 2 :]


def _drawn(questions: Questions, count: int) -> Iterator[tuple[str, str]]:
    """Questions with their answers, none that is asked."""
    what: dict[str, Any] = {"generator": questions.generator, "settings": questions.settings}
    asked = {item["question"] for item in reasoning.documents(size=ASKED, **what)["test"]}
    for item in reasoning.documents(size=count, seed=0, **what)["test"]:
        if item["question"] not in asked:
            yield item["question"], item["answer"]


def _write_task(path: Path, name: str, questions: Questions) -> None:
    described = {
        "include": str(FOLDER / "reasoning_gym" / "_generator.yaml"),
        "task": name,
        "dataset_kwargs": {
            "generator": questions.generator,
            "size": ASKED,
            "settings": questions.settings,
        },
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": LONGEST, "do_sample": False},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
