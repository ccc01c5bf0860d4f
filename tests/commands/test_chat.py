"""`llada chat`: what is typed is answered, turn by turn, on a terminal of any kind."""

import shutil
from pathlib import Path

import pytest

from llada_megatron import cli

OLD = Path(__file__).parents[1] / "old_run"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("chat") / "old"
    shutil.copytree(OLD, folder)
    return str(folder / "run")


def typed(monkeypatch, *lines: str) -> None:
    left = iter(lines)

    def answer(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)


def test_turns_are_answered_until_the_context_is_full_and_new_begins_again(run, monkeypatch, capsys):
    typed(monkeypatch, "Hi", "Hi", "/new", "Ho", "")
    assert cli.main(["chat", run, "--max-new-tokens", "4"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("4 tokens, ") == said.count(" a second (length)") == 2  # the second turn finds no room
    assert said.count("and the model's context of 32 has no room for more") == 1
    assert said.count("/new begins another one.") == 1


def test_what_cannot_be_talked_with_is_one_sentence(run, capsys):
    for arguments, sentence in (
        (["layout.processes=2"], "A chat runs in one process"),
        (["--rule", "best"], "There is no rule 'best'"),
        (["--chat-template", "llada2"], "writes <role>, which is no token of bytes"),
    ):
        assert cli.main(["chat", run, *arguments]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
