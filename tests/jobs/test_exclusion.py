"""Which nodes a failed preflight costs; Slurm itself is in tests/slurm."""

from llada_megatron.jobs.exclusion import MAX_NODES, failed_nodes

JOB = [f"n{number}" for number in range(64)]


def reason(*nodes: str) -> str:
    return "Preflight failed, nothing was trained. " + " ".join(
        f"Node {node} (host h, rank 3): does not see what node n9 (rank 0) wrote." for node in nodes
    )


def test_nodes_that_are_named_are_left_out_and_others_in_the_sentence_are_not():
    assert failed_nodes(reason("n3", "n5", "n3"), JOB) == ["n3", "n5"]
    assert failed_nodes("Preflight failed. Node n1 (rank 1), Node n2 (rank 2): no word", JOB) == ["n1", "n2"]


def test_a_host_that_is_no_node_of_the_job_is_not_excluded():
    assert failed_nodes(reason("login", "n3"), JOB) == ["n3"]


def test_what_all_nodes_or_many_have_at_once_is_no_node_s_fault():
    assert failed_nodes(reason("n1", "n2"), ["n1", "n2"]) == []
    assert failed_nodes(reason(*JOB[: MAX_NODES + 1]), JOB) == []
    assert failed_nodes(reason("n1"), ["n1"]) == ["n1"]
