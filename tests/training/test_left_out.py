"""Runs on a corpus that holds samples which cannot be trained on (training.bad_samples)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from llada_megatron.config.errors import BadInput, RunFailed
from tests.distributed import run_ranks
from tests.training.runs import (
    STEPS,
    TWO,
    arrays_in,
    assert_equal_within_rounding,
    checkpoint,
    comparable,
    configure,
    copy_corpus,
    records,
    train,
)


def plant(corpus: str, folder: Path, token: int) -> str:
    """The corpus, with a token in every fourth sample or so that cannot be trained on."""
    folder.mkdir(exist_ok=True)
    mine = copy_corpus(corpus, folder)
    np.memmap(f"{mine}.bin", np.uint16, "r+")[150::300] = token
    return mine


MASK, OUTSIDE = 257, 600
LEAVE_OUT = ["training.bad_samples=skip", "evaluation.block_sizes=['4']", "evaluation.sequences=4"]


@pytest.fixture(scope="module")
def left_out(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("left_out")
    assert train(configure(plant(corpus, folder, MASK), folder / "run", *LEAVE_OUT)) == [(STEPS, 0, True)]
    return folder


def what_was_left_out(run_dir: Path) -> list[tuple[int, list[int], list[str]]]:
    events = [event for event in records(run_dir, "events") if event["event"] == "left_out"]
    return [(event["step"], event["sequences"], event["why"]) for event in events]


def test_a_sample_that_cannot_be_trained_on_is_left_out_recorded_and_limited(corpus, left_out, tmp_path):
    found = what_was_left_out(left_out / "run")
    assert found and all("contains the mask token 257" in why for *_, whys in found for why in whys)
    assert all(4 * step <= sequence < 4 * step + 4 for step, sequences, _ in found for sequence in sequences)
    assert np.isfinite([record["loss"] for record in records(left_out / "run")]).all()
    steps = [step for step, sequences, _ in found for _ in sequences]
    manifest = json.loads((checkpoint(left_out / "run", STEPS) / "manifest.json").read_text())
    assert manifest["left_out_lately"] == steps
    mine = f"{left_out}/text"
    with pytest.raises(
        BadInput, match=r"document \d+ .*contains the mask token .*training\.bad_samples=skip"
    ):
        train(configure(mine, tmp_path / "refused"))
    limit = f"training.max_skipped_samples={len(steps) - 1}"
    begun = configure(mine, tmp_path / "run", *LEAVE_OUT, limit, f"training.steps={steps[-1]}")
    train(begun)  # up to the one that is too many: the count survives the resume
    with pytest.raises(RunFailed, match=rf"{len(steps)} samples were left out .*{limit}.*: document"):
        train(configure(mine, tmp_path / "run", *LEAVE_OUT, limit))
    window = [limit, "training.skip_window_steps=1"]
    assert train(configure(mine, tmp_path / "run", *LEAVE_OUT, *window)) == [(STEPS, 0, True)]
    assert comparable(tmp_path / "run") == comparable(left_out / "run")


def test_an_id_outside_the_vocabulary_is_left_out_like_a_mask_token(corpus, left_out, tmp_path):
    mine = plant(corpus, tmp_path, OUTSIDE)
    train(configure(mine, tmp_path / "run", *LEAVE_OUT))
    assert comparable(tmp_path / "run") == comparable(left_out / "run")
    assert "holds token 600, outside" in what_was_left_out(tmp_path / "run")[0][2][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        [],
        ["layout.tp=2"],
        pytest.param(["layout.pp=2"], marks=pytest.mark.full),
        pytest.param(["layout.cp=2"], marks=pytest.mark.full),
    ],
    ids=lambda layout: " ".join(layout) or "dp=2",
)
def test_a_sample_is_left_out_alike_on_every_rank(left_out, tmp_path, layout):
    train(configure(f"{left_out}/text", tmp_path, TWO, *LEAVE_OUT, *layout))
    assert_equal_within_rounding(tmp_path, left_out / "run")
    assert what_was_left_out(tmp_path) == what_was_left_out(left_out / "run")


def test_a_run_without_one_good_sample_leaves_the_weights_alone_and_fails(corpus, tmp_path):
    mine = copy_corpus(corpus, tmp_path)
    os.remove(f"{mine}.json")
    np.memmap(f"{mine}.bin", np.uint16, "r+")[:] = OUTSIDE
    with pytest.raises(RunFailed, match="Every one of the 6 steps was skipped"):
        train(configure(mine, tmp_path / "run", "training.bad_samples=skip", "checkpoint.every_steps=1"))
    first, last = run_ranks(arrays_in, [checkpoint(tmp_path / "run", step) for step in (2, 6)])[0]
    assert first == last
