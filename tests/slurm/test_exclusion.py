"""A node that fails the preflight is left out of the requeued job, where the job can do without it."""

import sys

import pytest

from tests.slurm.conftest import TWO_NODES

pytestmark = pytest.mark.slow  # of those that are not marked `full`
ONE_NODE = ["cluster.nodes=1", "cluster.gpus_per_node=2", "layout.processes=2", "layout.tp=2", *TWO_NODES[4:]]
OPTIONS = ["training.steps=2", "slurm.exclude_failed_nodes=true"]


def limited_python(tmp_path) -> str:
    """A Python for the ranks; on node1 they can write files of 100 KiB at most."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\n[ "$SLURMD_NODENAME" = node1 ] && ulimit -f 100\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return f"slurm.python={python}"


@pytest.fixture
def full_on_node1(tmp_path) -> str:
    return limited_python(tmp_path)


def test_a_run_on_one_node_finishes_on_another_one(make_run, full_on_node1):
    run = make_run(*ONE_NODE, *OPTIONS, full_on_node1)
    run.submit()
    run.wait(lambda: len(run.events("started")) == 2)
    why = run.status()["why"]
    run.wait_for_end("finished")
    assert [event["nodes"] for event in run.events("started")] == ["node1", "node2"]
    assert [event["nodes"] for event in run.events("excluded")] == [["node1"]]
    assert why.startswith("Preflight failed") and why.endswith("node1 left out since")


@pytest.mark.full
def test_a_run_that_needs_all_nodes_keeps_them_and_says_so(make_run, full_on_node1):
    run = make_run(*TWO_NODES, *OPTIONS, full_on_node1)
    run.submit()
    run.wait(lambda: run.events("excluded"))
    assert len(run.events("started")) == 1, run.story()
    assert "node1 not left out: the job could not start otherwise" in run.status()["why"], run.story()
    run.wait(lambda: len(run.events("started")) == 2)
    run.llada("stop", str(run.directory))
    run.wait(run.has_left_the_queue)
