"""Bytes, JSON and YAML of others: a value, or one line that says what is wrong."""

import os
from pathlib import Path

import pytest

from llada_megatron.config import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.config.foreign import MAX_DEPTH, parse_json, read_bytes
from llada_megatron.config.plain_yaml import read_plain_yaml


def test_a_pipe_is_refused_before_anything_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match=r"pipe is no regular file: give a file\.$"):
        read_bytes(tmp_path / "pipe", "give a file")
    with pytest.raises(BadInput, match="no regular file"):
        compose.load(tmp_path / "pipe")


def test_what_is_not_there_is_named_and_a_directory_is_the_systems_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none", Path("a\0b")):
        with pytest.raises(BadInput, match=r"give a file\.$"):
            read_bytes(path, "give a file")
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path, "give a file")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested more than 100 deep"),
        (b'{"a": ' * 100_000, "nested more than 100 deep"),
        (b"[" * 101 + b"]" * 101, "nested more than 100 deep"),
        (b"9" * 5000, "too many digits"),
        (b'{"a": "\\uD83d"}', "half of a surrogate pair"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b'{"a": 1', "Expecting"),
        (b'{"a": 1, "a": 2}', "'a' comes twice"),
    ],
)
def test_json_that_is_none_is_one_line(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(content)
    assert "\n" not in str(caught.value)


def test_json_as_deep_as_is_served_and_wide_is_read() -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert len(parse_json("[" + "[1], " * 200 + "[]]")) == 201


def test_json_is_read_with_a_byte_order_mark_and_whole_surrogate_pairs() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00 \\\\ud800"}') == {"a": "\U0001f600 \\ud800"}


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (BOMB, "more than 100,000 values"),
        ("a: &a [*a]", "stands for nothing before it"),
        ("[" * 100_000, "nested more than 100 deep"),
        ("a: 1\n\tb: 1", "(tab|token)"),
    ],
)
def test_yaml_that_grows_or_falls_deep_is_refused_before_it_is_built(
    tmp_path: Path, content: str, reason: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(BadInput, match=rf"config\.yaml is not YAML \(.*{reason}.*\): give another\.$"):
        read_plain_yaml(file, "give another")


def test_yaml_with_a_few_aliases_is_read(tmp_path: Path) -> None:
    for content in ("a: &a [x, x]\nb: [*a, *a]\n", "a: [" * 20 + "]" * 20):
        (tmp_path / "config.yaml").write_text(content)
        assert read_plain_yaml(tmp_path / "config.yaml", "give another") == content


def test_a_checkpoints_model_of_another_version_is_refused_by_name() -> None:
    for model, reason in (({"wings": 2}, "wings"), ([1], ""), ({}, "vocab_size")):
        with pytest.raises(BadInput, match=f"step_1 describes no model .*{reason}"):
            compose.model_of(Path("step_1"), {"model": model})
