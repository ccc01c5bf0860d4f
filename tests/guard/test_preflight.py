"""A node that cannot do its part is named before anything is built, on every rank alike."""

import contextlib
import io
import os
import re
import time
from dataclasses import replace
from unittest import mock

import pytest

from llada_megatron.config.compose import compose
from llada_megatron.config.errors import NodeFault
from llada_megatron.config.parameters import checkpoint_bytes
from llada_megatron.record.run_dir import OPTIMIZER, SHARDS
from llada_megatron.runtime.launch import node
from tests.distributed import run_ranks
from tests.training.runs import STEPS, TWO, checkpoint, configure, train

FAR_AHEAD = time.time() + 3600
FAULTS = {  # what is another thing on the last rank
    "clock": ("time.time", lambda: FAR_AHEAD),
    "wrong": ("product", lambda dtype: (False, 0.01)),
    "throttled": ("product", lambda dtype: (True, 100.0)),
    "broken": ("product", mock.Mock(side_effect=RuntimeError("uncorrectable ECC error\nmore"))),
    "full": ("shutil.disk_usage", lambda path: mock.Mock(free=1000)),
    "silent link": ("device.seconds", lambda: time.sleep(30)),
    "hangs": ("_space", lambda path: time.sleep(30)),
    "none": ("SLOW", 1.5),
}


def check_on_nodes(config, run_dirs, fault):
    """Each rank's refusal, its nodes and what it prints: a node of its own with its own view of run.dir."""
    from llada_megatron.guard import preflight
    from llada_megatron.parallel import groups

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    name, replacement = FAULTS[fault]
    groups.join(replace(config.layout, processes=ranks))
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(preflight, "node", lambda: f"node{rank}"))
        if fault in ("hangs", "silent link"):
            patches.enter_context(mock.patch.object(preflight, "EXCHANGE_SEC", 5.0))
        if rank == ranks - 1:
            patches.enter_context(mock.patch(f"{preflight.__name__}.{name}", replacement))
        printed = patches.enter_context(contextlib.redirect_stdout(io.StringIO()))
        raised, nodes = "", ()
        try:
            preflight.check_nodes(replace(config, run=replace(config.run, dir=str(run_dirs[rank]))))
        except NodeFault as fault_found:
            raised = re.sub("|".join(map(str, run_dirs[::-1])), "RUN_DIR", str(fault_found))
            nodes = fault_found.nodes
        finally:
            groups.destroy()
    return raised, nodes, printed.getvalue()


def say_three_nodes(run_dirs, fault="none", *overrides):
    """What they raised and the nodes at fault, which must be the same, and what rank 0 printed."""
    config = compose(["experiment=parity", *overrides])
    ranks = run_ranks(check_on_nodes, config, run_dirs, fault, processes=3)
    raised, nodes, printed = zip(*ranks, strict=True)
    assert len(set(raised)) == len(set(nodes)) == 1 and not any(printed[1:])
    return raised[0], nodes[0], printed[0]


@pytest.mark.parametrize(
    ("fault", "clause"),
    [
        ("clock", r"its clock is 3\d\d\d\.\d s ahead"),
        ("wrong", r"its device computed a wrong matrix product: leave this node out"),
        ("throttled", r"a matrix product took 100000\.00 ms, .* times the usual"),
        ("broken", r"its device failed \(uncorrectable ECC error\): leave this node out"),
        ("full", r"run\.dir=RUN_DIR has 0\.0 GB free, 3 more checkpoints take"),
    ],
)
def test_the_node_with_the_fault_is_named_and_no_other(tmp_path, fault, clause):
    raised, nodes, _ = say_three_nodes([tmp_path / "run"] * 3, fault)
    assert re.search(rf"Node node2 \(host \S+, rank 2\): {clause}", raised), raised
    assert raised.count("Node node") == 1 and nodes == ("node2",)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("hangs", r"(Node node2 \(rank 2\)|A rank that rank 0 names): no word within 5 s"),
        pytest.param(
            "silent link",
            r"An all-reduce within node0 and node1 and node2 failed \(.+\): check their network",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_node_that_hangs_is_named_to_those_who_wait(tmp_path, fault, sentence):
    with pytest.raises(NodeFault, match=sentence):
        run_ranks(check_until_silence, compose(["experiment=parity"]), [tmp_path] * 3, fault, processes=3)


def check_until_silence(config, run_dirs, fault):
    raised, nodes, _ = check_on_nodes(config, run_dirs, fault)
    raise NodeFault(raised, nodes)


def test_a_place_that_one_node_cannot_write_or_does_not_share_is_named(tmp_path):
    (tmp_path / "file").touch()
    shared = tmp_path / "run"
    raised, _, _ = say_three_nodes([shared, shared, tmp_path / "file" / "run"])
    assert re.search(r"Node node2 .*run\.dir=RUN_DIR cannot be written \(Not a directory\)", raised), raised
    raised, nodes, _ = say_three_nodes([shared, shared, tmp_path / "local"])
    assert re.search(r"Node node2 .*does not see in run\.dir=RUN_DIR what node node0", raised), raised
    assert raised.count("Node node") == 1 and nodes == ("node2",)


def test_a_disk_without_room_for_the_models_checkpoints_is_named(tmp_path):
    raised, nodes, _ = say_three_nodes(
        [tmp_path] * 3, "none", "model=llada2_flash", "checkpoint.keep_last=999"
    )
    assert "1000 more checkpoints take 1646235.3 GB" in raised  # 16 bytes for each of 102,889,705,216
    assert all(f"Node node{rank} " in raised for rank in range(3))
    assert nodes == ("node0", "node1", "node2")


def test_healthy_nodes_are_told_in_one_line_and_slow_ones_only_warned_of(tmp_path):
    raised, _, printed = say_three_nodes([tmp_path / "run"] * 3)
    assert not raised and printed.startswith("preflight: 3 nodes, 3 ranks; clocks within 0.")
    assert not list((tmp_path / "run").iterdir())


def test_a_slow_link_is_a_warning_that_names_its_nodes():
    from llada_megatron.guard.preflight import Report, slow_parts

    def reports(seconds):
        return [
            Report(rank, f"n{rank // 2}", "host", product_sec=1.0, all_reduce_sec=sec)
            for rank, sec in enumerate(seconds)
        ]

    assert not slow_parts(reports([1.0] * 10))
    [line] = slow_parts(reports([1, 1, 1, 1, 5, 1, 1, 1, 1, 1]))  # five nodes: two, and the last three
    assert "an all-reduce within n2 and n3 and n4 (ranks 4 to 9) takes 5.0 times as long" in line
    [line] = slow_parts([*reports([1, 1, 1]), Report(3, "n1", "n1", product_sec=2.0, all_reduce_sec=1.0)])
    assert "node n1 (rank 3) takes 2.0 times as long as usual for a matrix product" in line


def test_a_run_with_preflight_trains_and_its_checkpoints_are_as_large_as_estimated(corpus, tmp_path):
    config = configure(corpus, tmp_path, TWO, "training.preflight=true")
    assert train(config) == [(STEPS, 0, True)]
    saved = checkpoint(tmp_path, STEPS)
    files = [*(saved / SHARDS).iterdir(), *(saved / OPTIMIZER).iterdir()]
    headers = sum(file.stat().st_size for file in files) - checkpoint_bytes(config.model, config.precision)
    assert 0 < headers < 1_000_000  # a part of a tensor has one of some 1.5 KB, and there are 460 of them


def test_a_run_dir_that_cannot_be_written_is_told_with_its_node_before_anything_else(corpus, tmp_path):
    (tmp_path / "file").touch()
    config = configure(corpus, tmp_path / "file" / "run", TWO, "training.preflight=true")
    with pytest.raises(NodeFault, match=rf"Preflight failed.*Node {re.escape(node())} \(rank 0\): run\.dir="):
        train(config)
