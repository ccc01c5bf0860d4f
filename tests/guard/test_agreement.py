"""Ranks that were started for different runs, and ranks that die."""

import os
import signal
import time

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.runtime.launch import WorkerError
from tests.distributed import run_ranks
from tests.training.runs import LONG, TWO, configure, copy_corpus, records


def train_own_config(configs):
    from llada_megatron.training import loop

    return loop.run(configs[int(os.environ["RANK"])])


@pytest.mark.parametrize(
    "override, difference",
    [("optimizer.lr=0.5", r"optimizer\.lr: 0\.001 -> 0\.5"), ("layout.tp=2", r"layout\.tp: 1 -> 2")],
)
def test_ranks_of_different_configurations_are_told_apart_and_nothing_is_trained(
    corpus, tmp_path, override, difference
):
    configs = [configure(corpus, tmp_path, TWO), configure(corpus, tmp_path, TWO, override)]
    with pytest.raises(BadInput, match=f"Rank 1 was started for another run than rank 0: {difference}"):
        run_ranks(train_own_config, configs, processes=2)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_rank_that_reads_other_data_is_told_apart(corpus, tmp_path):
    other = copy_corpus(corpus, tmp_path)
    with open(f"{other}.bin", "r+b") as file:
        file.write(bytes([65, 0, 66, 0]))
    os.remove(f"{other}.json")  # which says what the file held before
    mine = configure(corpus, tmp_path / "run", TWO)
    with pytest.raises(BadInput, match=r"Rank 1 .*\.bin of data\.path\[0\] has the same size and other"):
        run_ranks(train_with_own_fingerprint, mine, other, processes=2)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def train_with_own_fingerprint(config, other):
    """Rank 1 finds other bytes under the same path, as on a node with a stale copy."""
    from dataclasses import replace
    from unittest import mock

    from llada_megatron.data import fingerprint
    from llada_megatron.training import loop

    if os.environ["RANK"] == "0":
        return loop.run(config)
    of_path = fingerprint.fingerprint
    stale = mock.patch.object(fingerprint, "fingerprint", lambda data: of_path(replace(data, path=[other])))
    with stale, mock.patch.dict(os.environ, LOCAL_RANK="0"):  # the first of its node
        return loop.run(config)


def train_until(config, fatal):
    """Rank 1 fails in its third step, while rank 0 waits for it in a collective."""
    from unittest import mock

    from llada_megatron.training import loop

    train_step = loop.train_step

    def step_or_fail(trainer, step):
        if step == 2 and os.environ["RANK"] == "1":
            if fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("a bug of rank 1")
        return train_step(trainer, step)

    with mock.patch.object(loop, "train_step", step_or_fail):
        loop.run(config)


@pytest.mark.parametrize(
    "fatal, message",
    [
        (False, r"(?s)process 1 failed:.*step_or_fail.*a bug of rank 1"),
        pytest.param(True, "process 1 was killed by SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_ends_the_run_with_its_traceback(corpus, tmp_path, fatal, message):
    began = time.monotonic()
    with pytest.raises(WorkerError, match=message):
        run_ranks(train_until, configure(corpus, tmp_path, TWO, LONG), fatal, processes=2)
    died = (tmp_path / "metrics.jsonl").stat().st_mtime
    assert len(records(tmp_path)) == 2
    assert time.time() - died < 30 and time.monotonic() - began < 300
