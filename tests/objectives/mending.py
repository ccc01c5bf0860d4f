"""Words spelt backwards, right and with planted faults: what docs/results/levenshtein.md measures with.

    python -m tests.objectives.mending write FOLDER             text, chats, questions, drafts and a task
    python -m tests.objectives.mending score RESULT.jsonl ...   of drafts.jsonl or questions.jsonl, by
                                                                `llada generate --input`

Nothing but the standard library is asked for, so that it can be written anywhere: words are random letters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random
from string import ascii_lowercase as LETTERS

LEARNT, ASKED, DRAFTED = 20_000, 200, 60
"""Words that are learnt, asked, and, of those, whose answers are drafted with each fault."""
SHORTEST, LONGEST = 6, 10
FAULTS = ("none", "substituted", "inserted", "deleted", "one of each")
"""What is planted in a draft of each held-out answer."""
TASK = """task: backward
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def write(folder: Path) -> None:
    """text.jsonl and chats.jsonl to learn from; of other words drafts.jsonl, and questions.jsonl, which
    tasks/backward.yaml asks too.
    """
    random = Random(0)
    words: dict[str, None] = {}
    while len(words) < LEARNT + ASKED:
        words["".join(random.choices(LETTERS, k=random.randint(SHORTEST, LONGEST)))] = None
    learnt, asked = [*words][:LEARNT], [*words][LEARNT:]
    _lines(folder / "text.jsonl", [{"text": f"{question(word)}\n{word[::-1]}"} for word in learnt])
    _lines(folder / "chats.jsonl", [{"messages": [user(word), answer(word)]} for word in learnt])
    questions = [{"question": question(w), "messages": [user(w)], "answer": w[::-1]} for w in asked]
    _lines(folder / "questions.jsonl", questions)
    drafts = [
        {"messages": [user(word)], "draft": spoiled(word[::-1], fault, random), "answer": word[::-1]}
        | {"fault": fault}
        for fault in FAULTS
        for word in asked[:DRAFTED]
    ]
    _lines(folder / "drafts.jsonl", drafts)
    task = folder / "tasks" / "backward.yaml"
    task.parent.mkdir(exist_ok=True)
    task.write_text(TASK.format(questions=folder / "questions.jsonl"), encoding="utf-8")


def question(word: str) -> str:
    """What is asked."""
    return f"Spell backward: {word}"


def user(word: str) -> dict[str, str]:
    """The question as a message."""
    return {"role": "user", "content": question(word)}


def answer(word: str) -> dict[str, str]:
    """The answer as a message."""
    return {"role": "assistant", "content": word[::-1]}


def spoiled(text: str, fault: str, random: Random) -> str:
    """A text with a fault of FAULTS at a random place; "one of each" has all three, one after the other."""
    kinds = {"none": (), "one of each": ("substituted", "inserted", "deleted")}.get(fault, (fault,))
    for kind in kinds:
        at = random.randrange(len(text))
        other = random.choice([letter for letter in LETTERS if letter != text[at]])
        behind = text[at:] if kind == "inserted" else text[at + 1 :]
        text = text[:at] + ("" if kind == "deleted" else other) + behind
    return text


def distance(one: str, other: str) -> int:
    """Levenshtein's: the least insertions, deletions and substitutions."""
    row = [*range(len(other) + 1)]
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def score(path: Path) -> str:
    """For each fault the percent of drafts that are the answer and the mean distance, before and after.

    Without drafts the percent of answers that are right, with its standard error, and tokens per forward.
    """
    results = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not any("draft" in each for each in results):
        share = sum(each["text"].strip() == each["answer"] for each in results) / len(results)
        error = (share * (1 - share) / len(results)) ** 0.5
        tokens = sum(len(each["tokens"]) for each in results)
        per_forward = tokens / sum(each["forwards"]["denoise"] for each in results)
        return f"{path}: right {100 * share:.1f} ± {100 * error:.1f} %   {per_forward:.2f} tokens a forward"
    said = []
    for fault in FAULTS:
        its = [each for each in results if each["fault"] == fault]
        texts = [(each["draft"], each["text"].strip(), each["answer"]) for each in its]
        forwards = sum(sum(each["forwards"].values()) for each in its)
        right = [sum(text == truth for text, truth in part) for part in _parts(texts)]
        away = [sum(distance(text, truth) for text, truth in part) for part in _parts(texts)]
        n = len(its)
        said.append(
            f"{fault:12} right {100 * right[0] / n:5.1f} -> {100 * right[1] / n:5.1f} %   distance"
            f" {away[0] / n:.2f} -> {away[1] / n:.2f}   {forwards / n:.2f} forwards"
        )
    return "\n".join([str(path), *said])


def _parts(texts: list[tuple[str, str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    return [(before, truth) for before, _, truth in texts], [(after, truth) for _, after, truth in texts]


def _lines(path: Path, records: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")


if __name__ == "__main__":
    verb, *paths = sys.argv[1:]
    if verb == "write":
        write(Path(paths[0]))
    else:
        print("\n".join(score(Path(path)) for path in paths))
