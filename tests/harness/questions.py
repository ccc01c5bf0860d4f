"""Tasks of a user's for tests: lm-eval's four kinds over one small file of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUESTIONS: list[dict[str, Any]] = [
    {"question": "The cat", "answer": "sat", "choices": ["sat", "moon", "sea"], "label": 0},
    {"question": "One two", "answer": "three", "choices": ["three", "four"], "label": 0},
    {"question": "Once upon a", "answer": "time", "choices": ["dog", "time"], "label": 1},
    {"question": "né" * 4, "answer": "é", "choices": ["x", "é"], "label": 1},
]
GENERATES = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n\n", "e"], "max_gen_toks": 9, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CHOOSES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "label",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
CONTINUES = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{question}}",
    "doc_to_target": " {{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
}
ROLLS = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}} {{answer}} " * 3,
    "metric_list": [{"metric": "bits_per_byte"}],
}


def folder_of(folder: Path, questions: list[dict[str, Any]] | None = None, **tasks: dict[str, Any]) -> Path:
    """A folder for --include-path, with a task of each name; JSON is YAML."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(each) + "\n" for each in (questions or QUESTIONS))
    (folder / "questions.jsonl").write_text(lines)
    for name, task in tasks.items():
        data = {"data_files": {"test": str(folder / "questions.jsonl")}}
        config = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **task}
        (folder / f"{name}.yaml").write_text(json.dumps(config))
    return folder
