"""Groups lie on nodes as the ranks do; messages take as long as rings and links say."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.config.layout import DENSE_AXES, EXPERT_AXES, coordinates
from llada_megatron.config.schema import ClusterConfig, LayoutConfig
from llada_megatron.plan.topology import Group, groups

NODE = ClusterConfig(gpus_per_node=8, node_gb_per_sec=400, network_gb_per_sec=50, link_efficiency=0.5)
AXES = {  # group: the axes in which its ranks differ, in their grid
    "tp": ({"tp"}, DENSE_AXES),
    "cp": ({"cp"}, DENSE_AXES),
    "dp": ({"cp", "dp"}, DENSE_AXES),
    "tp*cp": ({"tp", "cp"}, DENSE_AXES),
    "tp*dp": ({"tp", "cp", "dp"}, DENSE_AXES),
    "pp": ({"pp"}, DENSE_AXES),
    "etp": ({"etp"}, EXPERT_AXES),
    "ep": ({"ep"}, EXPERT_AXES),
    "ep*etp": ({"ep", "etp"}, EXPERT_AXES),
    "expert dp": ({"expert_dp"}, EXPERT_AXES),
}
ways = st.sampled_from([1, 2, 4])


@given(tp=ways, cp=ways, pp=ways, etp=ways, ep=ways, dp=ways)
def test_groups_are_those_of_the_process_grids(tp, cp, pp, etp, ep, dp) -> None:
    layout = LayoutConfig(processes=tp * cp * pp * etp * ep * dp, tp=tp, cp=cp, pp=pp, etp=etp, ep=ep)
    everyone = [coordinates(layout, rank) for rank in range(layout.processes)]
    for name, group in groups(layout, NODE).items():
        if name == "embedding":  # the first and the last of pp
            assert group.ranks == min(2, pp)
            continue
        if name == "bp":  # of decoding alone
            assert group.ranks == 1
            continue
        differing, grid = AXES[name]
        fixed = [axis for axis in grid if axis not in differing]
        ranks = [
            rank
            for rank, one in enumerate(everyone)
            if all(getattr(one, axis) == getattr(everyone[0], axis) for axis in fixed)
        ]
        per_node = Counter(rank // NODE.gpus_per_node for rank in ranks)
        assert (group.ranks, group.on_node) == (len(ranks), per_node[0])


def test_branches_are_dealt_over_neighbours_in_dp() -> None:
    links = groups(LayoutConfig(processes=32, tp=4, bp=4), NODE)
    assert (links["bp"].ranks, links["bp"].on_node) == (4, 2) and links["dp"].ranks == 8


def group(ranks: int, on_node: int) -> Group:
    return Group(ranks, on_node, node_rate=200e9, network_rate=25e9, node_latency=0.0, network_latency=0.0)


@pytest.mark.parametrize(
    ("ranks", "on_node", "operation", "seconds"),
    [
        (1, 1, "all_gather", 0.0),
        (8, 8, "all_gather", 7 / 8 / 200),
        (16, 8, "reduce_scatter", 15 / 16 / 200),  # eight network links of a node carry the ring
        (16, 1, "all_gather", 15 / 16 / 25),
        (16, 4, "all_gather", 15 / 16 / 100),
        (16, 8, "all_to_all", 8 / 16 / 25),
        (8, 8, "all_to_all", 7 / 8 / 200),
        (4, 1, "send", 1 / 25),
        (2, 2, "send", 1 / 200),
        (8, 8, "all_reduce", 2 * 7 / 8 / 200),
    ],
)
def test_a_gigabyte_takes(ranks, on_node, operation, seconds) -> None:
    assert group(ranks, on_node).seconds(operation, 1e9) == pytest.approx(seconds)


def test_latency_counts_for_empty_messages() -> None:
    ring = replace(group(16, 8), node_latency=1e-6, network_latency=1e-5)
    assert ring.seconds("all_gather", 0) == pytest.approx(7e-6 + 1e-5)
