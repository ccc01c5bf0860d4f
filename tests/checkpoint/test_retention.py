"""Retention and manifests need no model: the checkpoints here are manifests beside a small file."""

import json
from pathlib import Path

import pytest

from llada_megatron.checkpoint import publish, retention
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import CheckpointConfig
from llada_megatron.record.manifest import Checkpoint, Manifest, find, readable
from llada_megatron.record.run_dir import RunDir, step_of


def publish_one(run_dir: Path, step: int, **known) -> Path:
    final = RunDir(run_dir).checkpoint(step)
    aside = publish.begin(final)
    (aside / "shards").mkdir()
    (aside / "shards" / "weights").write_bytes(bytes([step]) * 1000)
    publish.finish(aside, final, Manifest(config={}, step=step, **known))
    return final


def steps(run_dir: Path) -> list[int]:
    return [step_of(path) for path in RunDir(run_dir).whole_checkpoints()]


def test_the_last_every_mth_the_best_and_the_ends_of_stages_stay(tmp_path):
    nll = {10: 2.0, 20: 1.0, 30: 3.0, 40: 1.5, 50: 1.6, 60: 1.7, 70: 1.8}
    for step, value in nll.items():
        publish_one(tmp_path, step, metrics={"nll_block32": value}, stage_ended=step == 10)
    (tmp_path / "checkpoints" / ".step_00000080.partial").mkdir()
    keep = CheckpointConfig(keep_last=1, keep_every_steps=30, keep_best=2)
    retention.retire(tmp_path, keep)
    assert steps(tmp_path) == [10, 20, 30, 40, 60, 70]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_what_a_run_would_go_back_to_stays_and_what_it_gave_up_is_not_that(tmp_path):
    for step in (10, 20, 30, 40):
        publish_one(tmp_path, step, rollbacks=[[10, 30]], skipped_lately=[25, 35] if step == 40 else [])
    assert [each.manifest.step for each in retention.from_before(readable(tmp_path), 30, [[10, 30]])] == [
        10,
        30,
    ]
    retention.retire(tmp_path, CheckpointConfig(keep_last=1), may_go_back=True)
    assert steps(tmp_path) == [10, 40], "20 lies before the first skipped step, and was given up"
    retention.retire(tmp_path, CheckpointConfig(keep_last=1))
    assert steps(tmp_path) == [40]


def test_checkpoints_without_the_metric_are_not_the_best(tmp_path):
    for step in (1, 2, 3):
        publish_one(tmp_path, step, metrics={"nll_ar": float(step)} if step < 3 else {})
    checkpoints = readable(tmp_path)
    assert [step_of(each.path) for each in retention.best(checkpoints, "nll_ar", 5)] == [1, 2]
    assert retention.best(checkpoints, "nll_block4", 5) == []


def test_a_manifest_holds_every_file_and_tells_when_one_changed(tmp_path):
    checkpoint = Checkpoint.read(publish_one(tmp_path, 3))
    manifest, weights = checkpoint.manifest, checkpoint.path / "shards" / "weights"
    assert manifest.files["shards/weights"]["bytes"] == 1000 and len(manifest.files) == 1
    assert manifest.versions["megatron-core"] and publish.damage(checkpoint) == []
    weights.write_bytes(bytes([4]) * 1000)
    assert publish.damage(checkpoint) == ["shards/weights has another SHA-256"]
    weights.unlink()
    assert publish.damage(checkpoint) == ["shards/weights is missing"]


@pytest.mark.parametrize("change", [{"step": 4}, {"unknown": 1}], ids=str)
def test_a_manifest_that_was_changed_is_refused(tmp_path, change):
    checkpoint = publish_one(tmp_path, 3)
    content = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(content | change))
    with pytest.raises(BadInput, match="is not a whole checkpoint"):
        Checkpoint.read(checkpoint)


def test_a_published_checkpoint_is_never_written_over(tmp_path):
    checkpoint = publish_one(tmp_path, 3)
    with pytest.raises(BadInput, match="exists already"):
        publish.begin(checkpoint)
    assert find(str(tmp_path)).path == checkpoint


def test_a_damaged_checkpoint_set_aside_twice_keeps_both(tmp_path):
    for _ in range(2):
        publish.set_aside_damaged(publish_one(tmp_path, 3))
    assert steps(tmp_path) == [] and len(list((tmp_path / "checkpoints").glob("damaged_*"))) == 2
