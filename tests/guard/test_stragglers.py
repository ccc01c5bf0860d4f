"""A slow rank is named although every rank's step takes equally long."""

import contextlib
import io
import os
import time
from pathlib import Path
from unittest import mock

from llada_megatron.commands.status import status
from llada_megatron.guard.stragglers import Times, slow_ranks
from llada_megatron.jobs.state import stragglers
from llada_megatron.record import events
from tests.distributed import run_ranks
from tests.training.runs import TWO, configure


def times(*measured):
    return [Times(rank, f"n{rank // 2}", *figures) for rank, figures in enumerate(measured)]


def test_ranks_are_compared_within_their_pipeline_stage():
    even = [(0, 1.0, 0.1), (0, 1.1, 0.1), (1, 9.0, 0.1), (1, 9.9, 0.1)]
    assert slow_ranks(times(*even)) == {}
    slow = {4: "rank 4 on n2 takes 2.7 times the median for forward and backward"}
    assert slow_ranks(times(*even, (0, 3.0, 0.1))) == slow


def test_a_rank_whose_device_is_slow_is_named_where_all_wait_for_it():
    slow = {2: "rank 2 on n1 takes 4.0 times the median for a matrix product"}
    assert slow_ranks(times((0, 3.0, 0.1), (0, 3.0, 0.1), (0, 3.0, 0.4))) == slow


def train_with_a_slow_rank(config) -> tuple[str, str]:
    """The terminal's error stream and the status in step 2, when rank 1 is slow in steps 0 and 1."""
    from llada_megatron.guard import stragglers
    from llada_megatron.objectives import passes
    from llada_megatron.training import loop

    forward_step, train_step = passes.forward_step, loop.train_step
    present, seen = [0], [""]

    def observed_train_step(trainer, number):
        present[0] = number
        if number == 2:
            seen[0] = status(Path(config.run.dir)).why
        return train_step(trainer, number)

    def slow_forward_step(*args):
        if os.environ["RANK"] == "1" or present[0] > 1:
            time.sleep(1)  # beside which a busy machine's own delays are small
        return forward_step(*args)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(passes, "forward_step", slow_forward_step))
        patches.enter_context(mock.patch.object(loop, "train_step", observed_train_step))
        patches.enter_context(mock.patch.object(stragglers, "product", lambda dtype: (True, 0.1)))
        said = patches.enter_context(contextlib.redirect_stderr(io.StringIO()))
        loop.run(config)
    return said.getvalue(), seen[0]


def test_a_run_names_the_rank_that_the_others_wait_for_until_it_is_well_again(corpus, tmp_path):
    config = configure(corpus, tmp_path, TWO, "training.straggler_every_steps=1", "training.steps=3")
    (said, why), (other, _) = run_ranks(train_with_a_slow_rank, config, processes=2)
    lines = [line for line in said.splitlines() if "takes" in line]
    assert [line[: line.index(" rank")] for line in lines] == ["warning: step 0:", "warning: step 1:"]
    assert "takes" not in other
    assert why.startswith("slow: rank 1 on") and "times the median for forward and backward" in why
    recorded = [event for event in events.read(tmp_path) if event["event"] == "stragglers"]
    assert [(event["step"], len(event["slow"])) for event in recorded] == [(0, 1), (2, 0)]


def test_a_status_names_a_few_slow_ranks_of_the_present_attempt(tmp_path):
    events.append(tmp_path, "started")
    events.append(tmp_path, "stragglers", step=9, slow=[f"rank {rank}" for rank in range(9)])
    assert stragglers(events.read(tmp_path)) == "slow: rank 0, rank 1, rank 2 and 6 more"
    events.append(tmp_path, "started")
    assert stragglers(events.read(tmp_path)) == ""
