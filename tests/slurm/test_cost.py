"""`llada cost` against Slurm's accounting: slurmdbd and MariaDB, as a site has them."""

import json

import pytest

from llada_megatron.jobs import account as cost
from tests.slurm import accounting
from tests.slurm.conftest import TWO_NODES

pytestmark = pytest.mark.full
SECONDS = 3
"""What sacct's whole seconds, a batch script's start and its last lines may add up to."""


def test_cost_takes_a_requeued_run_s_times_from_slurm_s_accounting(make_run, slurm, monkeypatch):
    if not slurm.has_accounting:
        pytest.skip(accounting.missing())
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    run = make_run(*TWO_NODES, "training.steps=6", "checkpoint.every_steps=1")
    run.submit()
    run.wait(lambda: len(run.losses()) >= 2)
    slurm.run("scontrol", "requeue", run.job())
    run.wait(lambda: len(run.events("first_step")) == 2)
    running = cost.account(run.directory, run.events())
    run.wait_for_end("finished")
    run.wait(run.has_left_the_queue)
    lines = cost.slurm.allocations([run.job()])[run.job()]
    account = cost.account(run.directory, run.events())

    record, started = run.events(), run.events("started")
    [submitted], ended = run.events("submitted"), run.events("ended")
    assert len(lines) == len(started) == 2 and running.attempts[1].outcome == "running"
    assert running.attempts[1].queue_sec == lines[1].started_at - lines[0].ended_at
    assert 0 < running.attempts[1].allocated_sec < account.attempts[1].allocated_sec
    for attempt, line in zip(account.attempts, lines, strict=True):
        assert attempt.allocated_sec == pytest.approx(line.ended_at - line.started_at)
        assert line.started_at - 1 <= started[attempt.number]["time"] < line.started_at + SECONDS
    assert abs(submitted["time"] - lines[0].queued_at) < SECONDS
    assert lines[1].queued_at == lines[0].ended_at
    assert abs(ended[-1]["time"] - lines[1].ended_at) < SECONDS
    assert account.attempts[1].queue_sec >= 5  # cred_expire: Slurm's own delay before a requeued job starts

    stated = run.llada("cost", str(run.directory), "--price", "2").stdout
    assert f"{account.device_hours:.4f}" in stated and "replayed" in stated, json.dumps(record)
