"""The demo's conversations: those that the package chatterbot-corpus carries in English (BSD).

YAML files, each with `conversations`: lists of what two people say in turn. The first becomes the user, the
second the assistant. Most are there several times, and many prompts have several answers.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config
from llada_megatron.demo.pretrained import Step
from llada_megatron.record.json_files import write_json_lines

EXPERIMENT, BASE = "sft_small", "sft_small_base"
PACKAGE = "chatterbot_corpus"
ROLES = ("user", "assistant")
Conversation = tuple[str, ...]
"""What is said in turn."""


def yaml_files(command: str) -> list[Path]:
    """The English files of the package; BadInput, with the command that installs it, where it is absent."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise BadInput(f"The package chatterbot-corpus is not installed: run `{command}`.")
    return sorted(Path(spec.origin).parent.glob("data/english/*.yml"))


def write_chats(files: list[Path], output_jsonl: Path) -> int:
    """Write a JSON line {"messages": [...]} per distinct conversation that has an answer; returns how many.

    The order is fixed. Prompts (first turns) with several answers come first, so that data.split leaves no
    prompt on both sides; within each part it is that of the prompts' SHA-256, mixed well.
    """
    found = distinct(files)
    answers = Counter(map(_prompt, found))

    def place(turns: Conversation) -> tuple[bool, bytes]:
        return answers[_prompt(turns)] == 1, hashlib.sha256(_prompt(turns).encode()).digest()

    write_json_lines(output_jsonl, map(as_messages, sorted(found, key=place)))
    return len(found)


def distinct(files: list[Path]) -> list[Conversation]:
    """The conversations that have an answer, each once."""
    return [*dict.fromkeys(turns for path in files for turns in _conversations(path))]


def as_messages(turns: Conversation) -> dict[str, list[dict[str, str]]]:
    """A record of `llada data prepare --format chat`."""
    return {"messages": [{"role": ROLES[number % 2], "content": said} for number, said in enumerate(turns)]}


def evaluations(config: Config) -> list[Step]:
    """Both models on the held-out answers under the same masks, without what pads the answers to blocks."""
    run, data = Path(config.run.dir), config.data
    held_out = [f"data.path=[{data.path[0]}]", f"data.split={data.split}", "data.pad_to=1", "run.seed=1"]
    options = ["--block-sizes", "32", "--sequences", "64", "--draws", "4"]
    return [
        Step(file, ["evaluate", str(checkpoint), *options, "--json", str(file), *held_out])
        for checkpoint, file in ((run / "base", run / "base.json"), (run, run / "answers.json"))
    ]


def _conversations(path: Path) -> Iterator[Conversation]:
    for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
        # One entry is a single text, an answer and its question in one.
        if isinstance(turns, list) and len(turns) > 1:
            yield tuple(str(said).strip() for said in turns)


def _prompt(turns: Conversation) -> str:
    return turns[0].lower()
