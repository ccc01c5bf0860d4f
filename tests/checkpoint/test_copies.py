"""Copies of checkpoints at a URL, here of fsspec's local file system, and runs that go on from them."""

import json
import shutil
from pathlib import Path

import pytest

from llada_megatron import cli
from llada_megatron.checkpoint.copies import Place
from llada_megatron.config.errors import BadInput
from tests.training.runs import STEPS, TWO, comparable, configure, records, train

KEPT = [f"step_{step:08d}" for step in (2, 4, 5, 6)]  # the ends of stages, and the last two
EVERY = ["checkpoint.every_steps=1", "checkpoint.at_stage_end=false", "checkpoint.keep_last=2"]


def settings(place: Path) -> list[str]:
    return [*EVERY, f"checkpoint.copy_to='file://{place}'"]


@pytest.fixture(scope="module")
def copied(corpus, tmp_path_factory) -> tuple[Path, Path]:
    """A run, and the place of its copies."""
    folder = tmp_path_factory.mktemp("copied")
    assert train(configure(corpus, folder / "run", *settings(folder / "place"), TWO)) == [(STEPS, 0, True)]
    return folder / "run", folder / "place"


def test_each_checkpoint_is_copied_as_it_is_and_kept_as_the_run_keeps_its_own(copied):
    run, place = copied
    own = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert own == KEPT
    assert sorted(path.name for path in place.iterdir()) == ["records", *own]
    for name in own:
        files = [path.relative_to(run / "checkpoints") for path in (run / "checkpoints" / name).rglob("*")]
        assert all(
            (place / file).read_bytes() == (run / "checkpoints" / file).read_bytes()
            for file in files
            if (run / "checkpoints" / file).is_file()
        )
    events = [event for event in records(run, "events") if event["event"] == "copied"]
    assert [event["step"] for event in events] == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_directory_is_lost_goes_on_from_its_copy(corpus, copied, tmp_path):
    run, place = copied
    mine = tmp_path / "place"
    shutil.copytree(place, mine)
    shutil.rmtree(mine / "step_00000006")
    (mine / "step_00000006").mkdir()
    (mine / "step_00000006" / "half").write_text("of a copy that never got its manifest")
    assert train(configure(corpus, tmp_path / "run", *settings(mine), TWO)) == [(STEPS, 0, True)]
    assert comparable(tmp_path / "run") == comparable(run)  # the records came back, step 5 was trained again
    assert (mine / "step_00000006" / "manifest.json").is_file()


@pytest.mark.slow
def test_a_copy_that_is_older_than_what_the_run_has_is_left_alone(corpus, copied, tmp_path):
    run, place = copied
    shutil.copytree(run, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoints" / "step_00000006" / "manifest.json").stat().st_mtime_ns
    assert train(configure(corpus, tmp_path / "run", *settings(place), TWO)) == [(STEPS, 0, True)]
    after = (tmp_path / "run" / "checkpoints" / "step_00000006" / "manifest.json").stat().st_mtime_ns
    assert before == after


@pytest.mark.slow
def test_a_damaged_copy_is_found_when_it_is_loaded(corpus, copied, tmp_path):
    _, place = copied
    mine = tmp_path / "place"
    shutil.copytree(place, mine)
    (file,) = (mine / "step_00000006" / "shards").glob("__0_0.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert train(configure(corpus, tmp_path / "run", *settings(mine), TWO)) == [(STEPS, 0, True)]
    assert (tmp_path / "run" / "checkpoints" / "damaged_step_00000006").is_dir()


def test_a_place_that_cannot_be_used_is_refused_at_the_start(corpus, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for url, sentence in [
        (f"file://{tmp_path}/file/place", "cannot be written to"),
        ("s3://bucket/run", r"s3fs"),
        ("nothing://bucket/run", "nothing"),
    ]:
        with pytest.raises(BadInput, match=sentence):
            train(configure(corpus, tmp_path / "run", *EVERY, f"checkpoint.copy_to='{url}'"))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_copy_that_fails_is_said_and_the_run_goes_on(corpus, tmp_path):
    place = tmp_path / "place"
    (place / "step_00000001").mkdir(parents=True)
    (place / "step_00000001" / "shards").write_text("in the way")
    assert train(configure(corpus, tmp_path / "run", *settings(place))) == [(STEPS, 0, True)]
    events = [event for event in records(tmp_path / "run", "events") if "copied" in event["event"]]
    assert [event["event"] for event in events] == ["not_copied", *["copied"] * 5]
    assert [path.name for path in sorted(place.glob("step_*/manifest.json"))] == ["manifest.json"] * 4


def test_a_checkpoint_is_fetched_by_hand(copied, tmp_path, capsys):
    _, place = copied
    assert cli.main(["checkpoint", "fetch", f"file://{place}", str(tmp_path)]) == 0
    assert "step_00000006" in capsys.readouterr().out
    found = json.loads((tmp_path / "checkpoints" / "step_00000006" / "manifest.json").read_text())
    assert found["step"] == 6
    assert cli.main(["checkpoint", "fetch", f"file://{place}", str(tmp_path), "--step", "5"]) == 0
    assert (tmp_path / "checkpoints" / "step_00000005" / "manifest.json").is_file()
    assert cli.main(["checkpoint", "fetch", f"file://{place}", str(tmp_path), "--step", "3"]) == 2
    assert "it has step 2 and 4 and 5 and 6" in capsys.readouterr().err
    assert [each.path.name for each in Place(f"file://{place}").checkpoints()] == KEPT
