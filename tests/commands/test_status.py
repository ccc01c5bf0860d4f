"""`llada status` of what is no run: a line that says so, beside those of the others."""

import shutil

import pytest

from llada_megatron.cli import main
from llada_megatron.config.compose import compose, save


@pytest.fixture
def good(tmp_path):
    (tmp_path / "good").mkdir()
    save(compose(["experiment=parity"]), tmp_path / "good" / "config.yaml")
    return tmp_path / "good"


def damaged(good, change):
    """The run with another config.yaml."""
    other = good.parent / "other"
    shutil.copytree(good, other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_bytes(change(text))
    return other


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"",
        lambda text: b"{}",
        lambda text: b"5",
        lambda text: b"[1, 2]",
        lambda text: b"\xff\xfe\x00",
        lambda text: b"run: " + b"[" * 20_000,
        lambda text: b"run: {name: x}\nmodel: null\n",
        lambda text: text.replace("clip_grad: 1.0", "clip_grad: .nan").encode(),
        lambda text: text.replace("clip_grad: 1.0", "clip: 1.0").encode(),
        lambda text: text.replace("tokens: 4096", "tokens: many").encode(),
        lambda text: text.replace("block_size: '4'", "block_size: '5'").encode(),
        lambda text: text.replace("block_size: '4'", "block_size: ${nowhere}").encode(),
        lambda text: text[: len(text) // 3].encode(),
    ],
)
def test_a_configuration_that_is_none_is_a_line_and_the_others_are_shown(good, capsys, change):
    assert main(["status", str(good), str(damaged(good, change))]) == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == "" and len(lines) == 3
    assert lines[1].startswith("parity") and "not running" in lines[1]
    assert "unreadable" in lines[2] and "config.yaml" in lines[2]


def test_a_folder_without_a_run_is_a_line(good, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["status", str(tmp_path / "empty"), str(tmp_path / "nowhere"), str(good)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert ["holds no run" in line for line in lines] == [False, True, True, False]


def test_a_record_of_no_step_is_named(good, capsys):
    (good / "metrics.jsonl").write_text('{"a": 1}\n')
    assert main(["status", str(good)]) == 2
    assert "metrics.jsonl has no 'step'" in "".join(capsys.readouterr())
