"""The conversations of a package as chats, and a small model that learns to answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llada_megatron.cli import main
from llada_megatron.config.compose import compose
from llada_megatron.config.ranges import shares_of
from llada_megatron.demo import conversations
from llada_megatron.tasks import data_packages

FOLDER = Path(sys.prefix) / "chats"
ROOT = Path(__file__).parents[2]
YAML = """categories: [greetings]
conversations:
- - Hello
  - Hi
- - Hello
  - Hi
- - hello
  - Good day
- - Are you a bot?
  - 'Yes'
  - Why?
- what is this? - a text
"""


@pytest.fixture
def package(monkeypatch) -> None:
    if not (FOLDER / conversations.PACKAGE).is_dir():
        pytest.skip("needs the package that `make test-slow` installs")
    monkeypatch.syspath_prepend(str(FOLDER))


def written(files: list[Path], output: Path) -> list[list[str]]:
    count = conversations.write_chats(files, output)
    chats = [json.loads(line)["messages"] for line in output.read_text().splitlines()]
    assert len(chats) == count
    assert all(
        [turn["role"] for turn in chat] == ["user", "assistant", "user"][: len(chat)] for chat in chats
    )
    return [[turn["content"] for turn in chat] for chat in chats]


def test_each_conversation_comes_once_and_prompts_with_several_answers_come_first(tmp_path) -> None:
    (tmp_path / "a.yml").write_text(YAML)
    found = written([tmp_path / "a.yml"], tmp_path / "chats.jsonl")
    assert found == [["Hello", "Hi"], ["hello", "Good day"], ["Are you a bot?", "Yes", "Why?"]]


@pytest.mark.slow
@pytest.mark.usefixtures("package")
def test_no_prompt_of_the_package_is_on_both_sides_of_the_split(tmp_path) -> None:
    output = tmp_path / "chats.jsonl"
    prompts = []
    for line in (
        conversations.write_chats(conversations.yaml_files("make sft-small"), output),
        *output.open(),
    )[1:]:
        prompts.append(json.loads(line)["messages"][0]["content"].lower())
    assert len(prompts) == 898
    train, validation = shares_of(compose(["experiment=sft_small"]).data.split)
    boundary = round(len(prompts) * train / (train + validation))
    assert not {*prompts[:boundary]} & {*prompts[boundary:]}


def test_without_the_package_the_demo_says_what_to_do(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = (FOLDER, data_packages.FOLDER)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry) not in elsewhere])
    assert main(["demo", "--experiment", "sft_small", "--short"]) == 2
    assert "run `make sft-small`" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.full
@pytest.mark.usefixtures("package")
def test_the_short_demo_ends_below_the_base_model_on_held_out_answers(tmp_path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "llada_megatron", "demo", "--experiment", "sft_small", "--short"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "sft_small_short"
    base, tuned = (json.loads((run / f"{name}.json").read_text()) for name in ("base", "answers"))
    assert base["sequences"] == tuned["sequences"] > 10
    assert tuned["bound"]["32"]["mean"] < base["bound"]["32"]["mean"]
