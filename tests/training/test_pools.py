"""Runs with block routing: no layout changes what they compute, and a resume goes on as if nothing was."""

from pathlib import Path

import pytest

from tests.training.runs import TWO, assert_equal_within_rounding, comparable, configure, records, train

POOLS = ["model.expert_capacity=4", "training.figures_every_steps=1"]


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight")
    train(configure(corpus, run_dir, *POOLS))
    return run_dir


FOUR = "layout.processes=4"
LAYOUTS = [
    pytest.param([TWO, "layout.ep=2"], marks=pytest.mark.slow),
    pytest.param([TWO, "layout.tp=2", "layout.ep=2", "layout.micro_batch=2"], marks=pytest.mark.slow),
    pytest.param([TWO, "layout.cp=2"], marks=pytest.mark.slow),
    pytest.param([TWO, "layout.pp=2", "layout.vpp=2"], marks=[pytest.mark.slow, pytest.mark.full]),
    pytest.param(
        [FOUR, "layout.tp=2", "layout.cp=2", "layout.ep=2"], marks=[pytest.mark.slow, pytest.mark.full]
    ),
    pytest.param([TWO, "layout.pp=2", "layout.recompute=full"], marks=[pytest.mark.slow, pytest.mark.full]),
    pytest.param(
        [TWO, "layout.recompute=selective", "layout.recompute_modules=[moe]", "layout.dispatcher=allgather"],
        marks=[pytest.mark.slow, pytest.mark.full],
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_no_layout_changes_what_pools_teach(corpus, straight, tmp_path, layout):
    train(configure(corpus, tmp_path, *POOLS, *layout))
    assert_equal_within_rounding(tmp_path, straight)
    for mine, theirs in zip(records(tmp_path), records(straight), strict=True):
        assert mine["load_max_over_mean"] == pytest.approx(theirs["load_max_over_mean"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.full
def test_a_resumed_run_is_the_one_that_went_on(corpus, straight, tmp_path):
    train(configure(corpus, tmp_path, *POOLS, "training.steps=3"))
    train(configure(corpus, tmp_path, *POOLS))
    assert comparable(tmp_path) == comparable(straight)
