"""Layouts for fewer nodes; what Slurm makes of them is in tests/slurm."""

import os

import pytest

from llada_megatron.commands import fewer_nodes
from llada_megatron.commands.submit import resubmit
from llada_megatron.config.compose import compose, load, save
from llada_megatron.config.errors import BadInput
from llada_megatron.jobs import attempts
from llada_megatron.record.run_dir import RunDir

SITE = [
    *("experiment=parity", "cluster.nodes=4", "cluster.gpus_per_node=2", "layout.processes=8", "layout.tp=2"),
    *("cluster.network_gb_per_sec=1", "cluster.network_latency_us=100", "layout.global_batch=8"),
]


def test_each_number_of_nodes_with_a_layout_keeps_the_global_batch_and_fits():
    config = compose([*SITE, "slurm.min_nodes=1"])
    found = fewer_nodes.on_fewer_nodes(config)
    assert list(found) == [3, 2, 1]
    for count, (fewer, described) in found.items():
        assert (fewer.layout.processes, fewer.cluster.nodes) == (2 * count, count) and "hours" in described
        assert fewer.layout.global_batch == 8 and fewer.schedule == config.schedule
    assert fewer_nodes.on_fewer_nodes(compose(SITE)) == {}


def test_numbers_of_nodes_without_a_layout_are_left_out_and_refused_where_they_are_all():
    six = [*SITE, "cluster.nodes=6"]  # ten devices divide neither the batch of 8 nor the four layers
    assert list(fewer_nodes.on_fewer_nodes(compose([*six, "slurm.min_nodes=4"]))) == [4]
    for least, why in ((6, "nothing to lose of cluster.nodes=6"), (5, "on none of 5 to 5 nodes")):
        with pytest.raises(BadInput, match=f"slurm.min_nodes={least}.*{why}"):
            fewer_nodes.on_fewer_nodes(compose([*six, f"slurm.min_nodes={least}"]))


def test_an_attempt_starts_with_the_configuration_for_the_nodes_that_it_got(tmp_path, monkeypatch, capsys):
    config = compose([*SITE, "slurm.min_nodes=2"])
    files = RunDir(tmp_path)
    files.submission.mkdir()
    files.config_on(9).write_text("of an earlier submission")
    fewer_nodes.keep(tmp_path, config, fewer_nodes.on_fewer_nodes(config))
    assert files.node_counts() == [4, 3, 2]
    save(config, files.config)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    for nodes in (2, 4):
        monkeypatch.setitem(os.environ, "SLURM_JOB_NUM_NODES", str(nodes))
        assert attempts.main(["start", str(tmp_path)]) == 0
        assert load(files.config).layout.processes == 2 * nodes
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(BadInput, match="no layout on 1 node: choose from 4, 3, 2"):
        resubmit(tmp_path, 1)
