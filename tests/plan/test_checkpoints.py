"""What a plan says of checkpoints follows from what each process writes."""

import pytest

from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from llada_megatron.config.parameters import total_parameters
from llada_megatron.plan.checkpoints import INDEX_SEC, Checkpoints
from llada_megatron.plan.estimate import plan
from llada_megatron.plan.planner import Planner

FLASH = ["experiment=llada2_flash_cpt", "cluster=h100_512"]


def planned(*overrides: str) -> Checkpoints:
    config = compose([*FLASH, *overrides])
    return plan(Planner(config), config.layout, rules.check(config)).checkpoints


def test_a_checkpoint_holds_fourteen_bytes_a_parameter_and_each_node_an_equal_part():
    found = planned()
    parameters = total_parameters(compose(FLASH).model)
    assert found.bytes == pytest.approx(14 * parameters, rel=2e-3)
    assert found.bytes / 64 < found.host_bytes_per_node < 30e9
    assert found.in_background


def test_a_save_in_the_foreground_waits_for_the_disk():
    behind, before = planned(), planned("checkpoint.in_background=false")
    assert behind.wait_seconds == pytest.approx(behind.copy_seconds + INDEX_SEC)
    assert before.wait_seconds == pytest.approx(behind.wait_seconds + behind.write_seconds)
    faster = planned("cluster.storage_gb_per_sec=1.2")
    assert faster.write_seconds == pytest.approx(behind.write_seconds / 2)
    assert planned("cluster.storage_gb_per_sec=0").wait_seconds is None


def test_copies_in_memory_take_a_nodes_files_and_its_peers_twice():
    plain, kept = planned(), planned("checkpoint.memory_every_steps=50")
    assert plain.memory_bytes_per_node == 0
    assert kept.memory_bytes_per_node == 4 * kept.host_bytes_per_node
