"""A slow rank is named although every rank's step takes equally long."""

import contextlib
import io
import os
import time
from unittest import mock

from llada_megatron.training.stragglers import Times, slow_ranks
from tests.distributed import run_ranks
from tests.training.test_run import TWO, configure


def times(*measured):
    return [Times(rank, f"n{rank // 2}", *figures) for rank, figures in enumerate(measured)]


def test_ranks_are_compared_within_their_pipeline_stage():
    even = [(0, 1.0, 0.1), (0, 1.1, 0.1), (1, 9.0, 0.1), (1, 9.9, 0.1)]
    assert slow_ranks(times(*even)) == []
    assert slow_ranks(times(*even, (0, 3.0, 0.1))) == [
        "rank 4 on n2 takes 2.7 times the median for forward and backward"
    ]


def test_a_rank_whose_device_is_slow_is_named_where_all_wait_for_it():
    assert slow_ranks(times((0, 3.0, 0.1), (0, 3.0, 0.1), (0, 3.0, 0.4))) == [
        "rank 2 on n1 takes 4.0 times the median for a matrix product"
    ]


def train_with_a_slow_rank(config) -> str:
    """What the terminal's error stream gets while rank 1 waits a second before each of its losses."""
    from llada_megatron.training import loop, step

    forward_step = step.forward_step

    def slow_forward_step(*args):
        time.sleep(1.0 if os.environ["RANK"] == "1" else 0.0)
        return forward_step(*args)

    slowed = mock.patch.object(step, "forward_step", slow_forward_step)
    with slowed, contextlib.redirect_stderr(io.StringIO()) as said:
        loop.run(config)
    return said.getvalue()


def test_a_run_names_the_rank_that_the_others_wait_for_in_every_step_asked_for(corpus, tmp_path):
    config = configure(corpus, tmp_path, TWO, "training.straggler_every_steps=2", "training.steps=3")
    first, other = run_ranks(train_with_a_slow_rank, config, processes=2)
    [line] = [line for line in first.splitlines() if "takes" in line]
    assert line.startswith("warning: step 1: ") and "rank 1 on" in line
    assert "takes" not in other
