"""The account of a run's time; Slurm's own accounting is in tests/slurm."""

import json

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.jobs import account as cost
from llada_megatron.jobs import cost_report, slurm
from llada_megatron.observe import cost_plot

RECORD = [
    {"event": "submitted", "time": 0.0, "job": "7"},
    {"event": "started", "time": 100.0, "job": "7", "devices": 4, "step": 0},
    {"event": "first_step", "time": 132.0, "step": 0, "replayed": 0},
    {"event": "saved", "time": 150.0, "step": 2, "seconds": 5.0},
    {"event": "ended", "time": 160.0, "exit_code": 1, "step": 2, "outcome": "again", "reason": ""},
    {"event": "started", "time": 200.0, "job": "7", "devices": 2, "step": 2},
    {"event": "first_step", "time": 212.0, "step": 2, "replayed": 3},
    {"event": "evaluated", "time": 230.0, "step": 4, "seconds": 4.0},
    {"event": "ended", "time": 240.0, "exit_code": 0, "step": 4, "outcome": "finished", "reason": ""},
]


@pytest.fixture
def run_dir(tmp_path):
    """Four steps of two seconds each, the first of another stage."""
    steps = [
        {
            "step": n,
            "stage": "ar" if n < 1 else "bdlm",
            "consumed_tokens": 100 * (n + 1),
            "tokens_per_sec": 50,
        }
        for n in range(4)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return tmp_path


@pytest.fixture
def sacct(monkeypatch):
    """What Slurm's accounting answers from now on; at first that it is not there."""
    answers = {"text": None}

    def run(*command, **variables):
        if answers["text"] is None:
            raise BadInput("sacct refused: Slurm accounting storage is disabled")
        return answers["text"]

    monkeypatch.setattr(slurm, "_run", run)
    return answers


def test_the_account_of_a_run_adds_up_by_attempt_stage_and_loss(run_dir, sacct):
    found = cost.account(run_dir, RECORD)
    first, second = found.attempts
    assert (first.queue_sec, second.queue_sec) == (100, 40)
    assert first.useful_sec == {"ar": 2, "bdlm": 2} and second.useful_sec == {"bdlm": 4}
    assert first.lost_sec == {
        "start-up": 30, "checkpoints": 5, "evaluation": 0, "replayed steps": 6, "other": 60 - 4 - 30 - 5 - 6
    }  # fmt: skip
    assert second.lost_sec["evaluation"] == 4 and second.lost_sec["other"] == 40 - 4 - 10 - 4
    assert found.device_hours == pytest.approx((4 * 60 + 2 * 40) / 3600)
    assert found.useful_hours == pytest.approx({"ar": 8 / 3600, "bdlm": 16 / 3600})
    parts = [*found.useful_hours.values(), *found.lost_hours.values()]
    assert sum(parts) == pytest.approx(found.device_hours) and found.goodput == pytest.approx(24 / 320)


def test_losses_that_overlap_are_not_counted_twice(run_dir, sacct):
    record = [dict(event, seconds=500.0) if event["event"] == "saved" else event for event in RECORD]
    first = cost.account(run_dir, record).attempts[0]
    assert first.allocated_sec == 60 and first.lost_sec["checkpoints"] == 26 and first.lost_sec["other"] == 0


def test_a_table_shows_every_attempt_stage_and_loss_and_a_picture_is_drawn(run_dir, sacct, tmp_path):
    found = cost.account(run_dir, RECORD)
    text = cost_report.markdown(found, price=2.0)
    assert "Goodput 7.5%" in text and "Cost 0.18 at 2 per device-hour" in text
    assert "0: 0.0022, 1: 0.0022 |" in next(line for line in text.splitlines() if " bdlm " in line)
    assert len({len(line) for line in text.splitlines() if line.startswith("| ")}) == 2  # two even tables
    cost_plot.draw(found, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 1000


def test_slurm_s_accounting_is_believed_before_the_run_s_own_record(run_dir, sacct):
    sacct["text"] = "7|0|60|98|163\n7|166|190|199|Unknown\n"
    first, second = cost.account(run_dir, RECORD).attempts
    assert (first.queue_sec, first.allocated_sec) == (38, 65)  # not while a dependency held it back
    assert (second.queue_sec, second.allocated_sec) == (36, 41)  # from the end, with what Slurm takes


def test_an_attempt_gets_the_start_of_its_own_job_at_its_own_time(run_dir, sacct):
    record = [*RECORD, {"event": "started", "time": 900.0, "job": "8", "devices": 2, "step": 4}]
    sacct["text"] = "7|0|0|99|161\n7|161|161|200|240\n8|800|800|895|Unknown\n8|5000|5000|6000|7000\n"
    third = cost.account(run_dir, record, now=1000.0).attempts[2]
    assert (third.queue_sec, third.allocated_sec, third.outcome) == (95, 105, "running")
    sacct["text"] = "8|0|0|50|60\n"  # of years ago: numbers come again
    assert cost.account(run_dir, record, now=1000.0).attempts[2].allocated_sec == 100


def test_a_job_that_waits_has_no_start():
    assert not slurm.parse_sacct("7|0|Unknown|Unknown|Unknown\n")["7"]
