"""Limits that know how long a save of the run takes."""

import json

import pytest

from llada_megatron.config.schema import TrainingConfig
from llada_megatron.guard.timeouts import Timeouts, fitted
from llada_megatron.record.pace import Pace
from llada_megatron.verify.layouts import write_corpus
from tests.distributed import run_ranks
from tests.training.runs import configure


@pytest.mark.parametrize(
    ("pace", "expected", "raised"),
    [
        (Pace(), (600, 1800, 300), []),
        (Pace(step_sec=10, save_sec=139), (600, 1800, 300), []),
        (Pace(step_sec=10, save_sec=160), (600, 1800, 340), ["stop_deadline_sec=300 is raised to 340"]),
        (
            Pace(step_sec=10, save_sec=400.2),
            (801, 1800, 821),
            ["collective_timeout_sec=600 is raised to 801", "stop_deadline_sec=300 is raised to 821"],
        ),
    ],
)
def test_limits_that_a_save_may_pass_are_raised_and_said(pace, expected, raised):
    timeouts, said = fitted(TrainingConfig(), pace)
    assert timeouts == Timeouts(*expected)
    assert len(said) == len(raised) and all(words in one for words, one in zip(raised, said, strict=True))


def test_no_limit_stays_none():
    settings = TrainingConfig(hang_timeout_sec=0, stop_deadline_sec=0)
    timeouts, said = fitted(settings, Pace(step_sec=1, save_sec=1e6))
    assert (timeouts.hang_timeout_sec, timeouts.stop_deadline_sec) == (0, 0) and len(said) == 1


def limits_of_a_run(config):
    from llada_megatron.guard.watchdog import Watchdog
    from llada_megatron.training import loop

    allowed = []
    Watchdog.allow = lambda watchdog, **limits: allowed.append(limits)
    loop.run(config)
    return allowed


def test_a_run_goes_by_its_record_and_by_the_saves_that_it_makes(tmp_path):
    event = {"event": "saved", "time": 1.0, "step": 1, "seconds": 160.0}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.jsonl").write_text(json.dumps(event) + "\n")
    config = configure(write_corpus(tmp_path), tmp_path / "run", "training.steps=1")
    assert run_ranks(limits_of_a_run, config) == [[{"hang_timeout_sec": 1800.0, "stop_deadline_sec": 320.0}]]
    (tmp_path / "run" / "events.jsonl").unlink()
    config = configure(str(config.data.path[0]), tmp_path / "other", "training.steps=1")
    before, after = run_ranks(limits_of_a_run, config)[0]  # a save longer than any before: the first one
    assert before == after == {"hang_timeout_sec": 1800.0, "stop_deadline_sec": 300.0}
