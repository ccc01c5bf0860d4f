"""How a run goes, as its report tells it: progress, plan beside measurement, cost and events."""

import json
import os
import time
from dataclasses import replace

import pytest

from llada_megatron.config.compose import compose, load, save
from llada_megatron.config.rules import schedule_of
from llada_megatron.observe.parts import Heading, to_markdown
from llada_megatron.observe.report_life import cost, happened, layout, overview
from llada_megatron.observe.run import Run, figures_of
from llada_megatron.plan.estimate import plan
from llada_megatron.plan.planner import Planner
from llada_megatron.record import events
from llada_megatron.record.run_dir import RunDir
from tests.observe.runs import SCHEDULE, STEP_TOKENS, make_run

STEPS = sum(count for *_, count in SCHEDULE)
DONE = 70


@pytest.fixture
def going(tmp_path):
    return make_run(tmp_path / "run", stop_after=DONE, evaluated=False)


def figures(run_dir):
    """What report.json would hold, and these parts of the report as Markdown."""
    run = Run.read(run_dir)
    report = figures_of(run)
    parts = [*overview(run, report), Heading("Below"), *layout(run, report), *cost(report)]
    return report, to_markdown([*parts, *happened(run.events)])


def change(run_dir, **groups):
    """Other settings of a run."""
    path = RunDir(run_dir).config
    config = load(path)
    changed = {name: replace(getattr(config, name), **values) for name, values in groups.items()}
    save(replace(config, **changed), path)


def test_a_running_run_says_where_it_is_and_when_it_ends_at_the_speed_of_its_last_steps(going):
    report, text = figures(going)
    now = report["progress"]
    assert (now["step"], now["steps"], now["complete"], now["going"]) == (DONE, STEPS, False, True)
    assert (now["tokens"], now["total_tokens"]) == (DONE * STEP_TOKENS, STEPS * STEP_TOKENS)
    assert now["state"] == "running" and now["tokens_per_sec"] == 1000 + (20 + 69) / 2
    assert now["remaining_sec"] == pytest.approx((STEPS - DONE) * STEP_TOKENS / now["tokens_per_sec"])
    assert f"{DONE / STEPS:.1%}, about 4.6 minutes left" in text and f"{DONE} of {STEPS}" in text


def test_a_silent_run_is_not_running_and_has_no_end_in_sight(going):
    old = time.time() - 10_000
    os.utime(RunDir(going).metrics, (old, old))
    report, text = figures(going)
    assert report["progress"]["state"] == "not running" and report["progress"]["remaining_sec"] is None
    assert report["progress"]["going"] and " left" not in text


def test_a_finished_run_goes_on_no_more(tmp_path):
    now = figures(make_run(tmp_path / "run"))[0]["progress"]
    assert (now["state"], now["complete"], now["going"], now["remaining_sec"]) == (
        "finished",
        True,
        False,
        None,
    )


def test_a_run_that_ends_before_its_schedule_is_complete_there(going):
    change(going, training={"steps": DONE})
    now = figures(going)[0]["progress"]
    assert now["complete"] and now["steps"] == DONE and now["total_tokens"] == DONE * STEP_TOKENS


def test_why_a_run_stopped_and_what_happened_last_stand_at_the_top_and_among_the_events(going):
    events.append(going, "started", devices=2, step=0)
    events.append(going, "ended", exit_code=2, step=5, outcome="failed", reason="node7 has | no disk")
    report, text = figures(going)
    top, bottom = text.split("## Below")
    assert report["progress"]["state"] == "failed" and "Failed: node7 has | no disk." in top
    assert "ended: exit_code 2, step 5, outcome failed" in top and "node7 has \\| no disk" in bottom
    assert bottom.index("ended: exit_code") < bottom.index("started: devices 2")


def test_only_the_newest_events_are_shown_and_the_rest_are_counted(going):
    for step in range(30):
        events.append(going, "saved", step=step, seconds=1.0)
    text = figures(going)[1]
    assert "The newest 20; 10 came before." in text
    assert "saved: step 10, seconds 1" in text and "saved: step 9, seconds 1" not in text


def test_the_plan_stands_beside_the_medians_of_what_was_measured(going):
    cluster = compose(["experiment=parity", "cluster=h100"]).cluster
    change(going, cluster=vars(cluster) | {"nodes": 1, "gpus_per_node": 1})
    lines = [json.loads(line) for line in RunDir(going).metrics.read_text().splitlines()]
    for line in lines:
        line |= {"mfu": 0.25, "peak_memory_bytes": 7_500_000 + line["step"]}
    RunDir(going).metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report, text = figures(going)
    config = load(RunDir(going).config)
    expected = plan(Planner(config), config.layout, schedule_of(config))
    found = {stage["name"]: stage for stage in report["plan"]["stages"]}
    assert report["plan"]["refused"] is None and list(found) == [stage.name for stage in expected.stages]
    for stage in expected.stages:
        assert found[stage.name]["planned"]["step_sec"] == stage.step_seconds
    measured = found["pretrain"]["measured"]
    assert measured["mfu"] == 0.25 and measured["step_sec"] == pytest.approx(STEP_TOKENS / 1029.5, rel=1e-3)
    assert found["stable"]["measured"] is None
    memory = report["plan"]["memory"]
    assert memory["planned_bytes"] == expected.fullest.peak
    assert memory["measured_bytes"] == 7_500_000 + DONE - 1 and "7.5 MB" in text and "25.0%" in text


def test_a_layout_that_cannot_be_planned_says_why_and_shows_what_was_measured(going):
    change(going, cluster={"memory_gb": 0.0})
    report, text = figures(going)
    assert "cluster.memory_gb is not known" in report["plan"]["refused"] and report["plan"]["refused"] in text
    assert report["plan"]["stages"][0]["planned"] is None
    assert report["plan"]["stages"][0]["measured"]["tokens_per_sec"] == 1029.5


def test_the_cost_of_a_run_without_attempts_is_that_of_its_steps(going):
    report, text = figures(going)
    seconds = sum(STEP_TOKENS / (1000 + step) for step in range(DONE))
    assert report["cost"]["device_hours"] == pytest.approx(seconds / 3600)
    assert (report["cost"]["money"], report["cost"]["attempts"]) == (None, [])
    assert "Steps alone" in text and "money" not in text


def test_the_cost_of_attempts_counts_all_their_devices_and_the_cluster_s_price(going):
    change(going, cluster={"price_per_gpu_hour": 2.5})
    begin = time.time() - 7200
    events.append(going, "started", time=begin, devices=4, step=0)
    events.append(
        going, "ended", time=begin + 3600, exit_code=0, step=DONE, outcome="stopped", reason="asked"
    )
    report, text = figures(going)
    assert report["cost"]["device_hours"] == pytest.approx(4.0)
    assert report["cost"]["money"] == pytest.approx(10.0) and "10.00 at 2.5 per device-hour" in text
    assert sum(report["cost"]["by_use"].values()) == pytest.approx(4.0)
    assert [each["outcome"] for each in report["cost"]["attempts"]] == ["stopped"]
