"""Which nodes a failed preflight costs; Slurm itself is in tests/slurm."""

from llada_megatron.jobs.exclusion import MAX_NODES, failed_nodes

JOB = [f"n{number}" for number in range(64)]


def test_blamed_nodes_are_left_out_once_each():
    assert failed_nodes(["n3", "n5", "n3"], JOB) == ["n3", "n5"]


def test_a_host_that_is_no_node_of_the_job_is_not_excluded():
    assert failed_nodes(["login", "n3"], JOB) == ["n3"]


def test_what_all_nodes_or_many_have_at_once_is_no_node_s_fault():
    assert failed_nodes(["n1", "n2"], ["n1", "n2"]) == []
    assert failed_nodes(JOB[: MAX_NODES + 1], JOB) == []
    assert failed_nodes(["n1"], ["n1"]) == ["n1"]
