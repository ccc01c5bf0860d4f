"""What the documents say to type can be typed: each command's options exist, and its settings go together."""

import re
import shlex

import pytest

from llada_megatron import cli
from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from tests.docs.test_extending import DOCUMENTS

COMMAND = re.compile(r"^ +(?:[A-Z_]+=\S+ )*llada ([a-z][^\n]*)$", re.MULTILINE)
PLACEHOLDER = re.compile(r"\.\.\.|\$|\[--|\b[A-Z]\b|NAME|my_")
"""Stands for what the reader has, in lines that are no command as they are."""


def commands() -> list[list[str]]:
    """The words after `llada` of every line of a block of code, without what a shell makes of the rest."""
    found = {}
    for page in DOCUMENTS:
        for line in COMMAND.findall(page.read_text().replace("\\\n", " ")):
            words = re.split(r" [|>&]", line)[0]
            if not PLACEHOLDER.search(words.split(" #")[0]):
                found[tuple(shlex.split(words, comments=True))] = page
    return [list(words) for words in found]


def parsed(words: list[str]):
    """The verb and the arguments of a command; None after --help."""
    count = 2 if " ".join(words[:2]) in cli.VERBS else 1
    verb = " ".join(words[:count])
    try:
        return verb, cli.parse(verb, words[count:])[1]
    except SystemExit as end:
        assert not end.code, f"llada {shlex.join(words)}"
        return verb, None


def test_every_command_is_understood():
    found = commands()
    assert len(found) > 200
    for words in found:
        parsed(words)


@pytest.mark.slow
def test_settings_of_every_training_that_is_named_go_together():
    found = [
        args.overrides
        for verb, args in map(parsed, commands())
        if verb in ("train", "plan", "submit") and args
    ]
    named = [overrides for overrides in found if any(each.startswith("experiment=") for each in overrides)]
    assert len(named) > 50
    for overrides in named:
        rules.check(compose(overrides))
