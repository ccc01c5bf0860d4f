"""Questions with four answers, of the conversations on science and trivia in chatterbot-corpus (BSD).

Made like ARC (arXiv 1803.05457) in form alone: the wrong answers are right ones of other questions, so they
are easier to tell apart than answers that somebody wrote to mislead.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from llada_megatron.tasks.data_packages import dataset, folder_of

if TYPE_CHECKING:
    from datasets import Dataset

TOPICS = ("science", "trivia")
CHOICES = 4


def documents(**_: Any) -> dict[str, Dataset]:
    """The split `test`: question, four choices, and `gold`, the index of the right one."""
    import yaml

    folder = folder_of("chatterbot_corpus", distribution="chatterbot-corpus") / "data" / "english"
    items = []
    for topic in TOPICS:
        content = yaml.safe_load((folder / f"{topic}.yml").read_text(encoding="utf-8"))
        pairs = [(str(first).strip(), str(reply).strip()) for first, reply, *_ in content["conversations"]]
        items += [_item(topic, index, pairs) for index in range(len(pairs))]
    return dataset(test=items)


def _item(topic: str, index: int, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    question, right = pairs[index]
    # Every answer to the same question is right, and so is one that differs in capitals alone.
    taken = {answer.casefold() for asked, answer in pairs if asked.casefold() == question.casefold()}
    others = {answer.casefold(): answer for _, answer in pairs if answer.casefold() not in taken}
    drawn = random.Random(f"{topic} {index}")
    choices = [right, *drawn.sample(sorted(others.values()), CHOICES - 1)]
    drawn.shuffle(choices)
    return {"question": question, "choices": choices, "gold": choices.index(right)}
