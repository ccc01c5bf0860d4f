"""Tasks by name: a user's, lm-eval's own where the data is on disk, and one sentence for any other."""

from __future__ import annotations

import json

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.harness import tasks
from tests.harness.questions import CHOOSES, GENERATES, folder_of
from tests.harness.test_asking import offline  # noqa: F401 - an autouse fixture


def test_a_file_a_pattern_and_a_name_are_the_same_task(tmp_path):
    folder = folder_of(tmp_path, writes=GENERATES, chooses=CHOOSES)
    assert [*tasks.load(["w*s"], [folder], fewshot=None)["tasks"]] == ["writes"]
    assert [*tasks.load([str(folder / "writes.yaml")], [], fewshot=None)["tasks"]] == ["writes"]
    both = tasks.load(["writes", "chooses", "writes"], [folder], fewshot=3)["tasks"]
    assert {name: task.get_config("num_fewshot") for name, task in both.items()} == {
        "writes": 3,
        "chooses": 3,
    }
    insists = folder_of(tmp_path, none={**GENERATES, "num_fewshot": 0}, one={**GENERATES, "num_fewshot": 1})
    found = tasks.load(["none", "one"], [insists], fewshot=3)["tasks"]
    assert [task.get_config("num_fewshot") for task in found.values()] == [0, 3]


def test_what_does_not_load_is_one_sentence_with_the_tasks_name(tmp_path):
    broken = {**GENERATES, "output_type": "paints"}
    lost = {**GENERATES, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "gone.jsonl")}}}
    runs = {**GENERATES, "unsafe_code": True}
    folder = folder_of(tmp_path, broken=broken, lost=lost, runs=runs)
    with pytest.raises(BadInput, match="The data of task lost is not on this machine"):
        tasks.load(["lost"], [folder], fewshot=None)
    with pytest.raises(BadInput, match=r"Task broken does not load: .*paints") as refused:
        tasks.load(["broken"], [folder], fewshot=None)
    assert "\n" not in str(refused.value)
    loaded = tasks.load(["runs"], [folder], fewshot=None)["tasks"]
    with pytest.raises(BadInput, match=r"Task runs runs programs .*: give --allow-code"):
        tasks.check_code(loaded, allowed=False)
    tasks.check_code(loaded, allowed=True)


@pytest.mark.slow
def test_a_task_of_lm_evals_own_finds_its_data_in_a_folder_of_that_name(tmp_path, monkeypatch):
    folder = tmp_path / "allenai" / "ai2_arc"
    folder.mkdir(parents=True)
    choices = {"text": ["water", "stone"], "label": ["A", "B"]}
    document = {"id": "1", "question": "What is wet?", "choices": choices, "answerKey": "A"}
    splits = ("train", "validation", "test")
    for split in splits:
        (folder / f"{split}.jsonl").write_text(json.dumps(document) + "\n")
    files = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
    configs = json.dumps({"configs": [{"config_name": "ARC-Easy", "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{configs}\n---\n")
    monkeypatch.chdir(tmp_path)
    manager = tasks._manager([], stock=True)  # takes seconds
    monkeypatch.setattr(tasks, "_manager", lambda folders, stock: manager)
    (task,) = tasks.load(["arc_easy"], [], fewshot=None)["tasks"].values()
    assert task.doc_to_text(task.eval_docs[0]) == "Question: What is wet?\nAnswer:"
    with pytest.raises(BadInput, match="The data of task gsm8k_cot_zeroshot is not on this machine"):
        tasks.load(["gsm8k_cot_zeroshot"], [], fewshot=None)
    with pytest.raises(BadInput, match="There is no task arc_easi: did you mean arc_easy"):
        tasks.load(["arc_easi"], [], fewshot=None)
