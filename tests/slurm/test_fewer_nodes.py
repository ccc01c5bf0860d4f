"""A run that loses a node, which nothing replaces, goes on with fewer in another layout."""

import json

import pytest

from tests.slurm.conftest import TWO_NODES
from tests.slurm.test_exclusion import limited_python
from tests.slurm.test_life import wait_for_steps

pytestmark = pytest.mark.slow
STEPS = 6
RUN = [*TWO_NODES, f"training.steps={STEPS}", "checkpoint.every_steps=1", "slurm.min_nodes=1"]


def check_end(run, nodes: list[str]) -> None:
    """The run did all steps, the last ones on one node with the layout that its submission found."""
    run.wait_for_end("finished")
    assert [(event["nodes"], event["devices"]) for event in run.events("started")] == [
        ("node[1-2]", 4),
        *[(node, 2) for node in nodes],
    ], run.story()
    assert len(run.losses()) == STEPS
    [excluded] = run.events("excluded")
    layouts = json.loads((run.directory / "submission" / "submission.json").read_text())["fewer_nodes"]
    assert excluded["goes_on_with"] == 1 and excluded["layout"] == layouts["1"] and not excluded["problem"]


def test_a_lost_node_that_nothing_replaces_leaves_the_run_on_the_other_one(make_run):
    run = make_run(*RUN)
    assert "on 1 node: " in run.submit().stdout
    wait_for_steps(run, 2)
    run.slurm.kill_node("node2")
    try:
        check_end(run, ["node1"])
        assert "  processes: 2\n" in (run.directory / "config.yaml").read_text()
        assert run.events("excluded")[0]["nodes"] == ["node2"]
    finally:
        run.slurm.start_node("node2")


@pytest.mark.full
def test_a_node_that_is_gone_without_a_word_leaves_the_run_on_the_other_one(make_run):
    run = make_run(*RUN)
    run.submit()
    wait_for_steps(run, 2)
    run.slurm.kill_node("node2", silently=True)
    try:
        check_end(run, ["node1"])
        assert run.events("excluded")[0]["nodes"] == ["node2"]
    finally:
        run.slurm.start_node("node2")


@pytest.mark.full
def test_a_job_whose_script_was_on_the_node_that_is_gone_is_told_to_go_on_without(make_run):
    run = make_run(*RUN)
    run.submit()
    wait_for_steps(run, 2)
    refused = run.llada("resume", str(run.directory), "--nodes", "3", check=False)
    assert refused.returncode == 2 and "choose from 2, 1" in refused.stderr
    run.slurm.kill_node("node1", silently=True)
    try:
        run.wait(lambda: run.status()["state"] == "pending")
        assert run.llada("resume", str(run.directory), "--nodes", "1").stdout == f"job {run.job()}\n"
        run.wait_for_end("finished")
        assert [event["devices"] for event in run.events("started")] == [4, 2], run.story()
        assert len(run.losses()) == STEPS
    finally:
        run.slurm.start_node("node1")


@pytest.mark.full
def test_a_node_that_fails_the_preflight_is_left_out_of_a_run_that_may_have_fewer(make_run, tmp_path):
    python = limited_python(tmp_path)
    run = make_run(*RUN, python)
    run.submit()
    check_end(run, ["node2"])
    assert run.events("excluded")[0]["nodes"] == ["node1"]
    assert "node1 left out since, on 1 node with" not in run.status()["why"], "it is of an attempt before"
