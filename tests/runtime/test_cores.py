"""Which cores of a node its ranks share out."""

import pytest

from llada_megatron.runtime import cores

THREADS_OF_A_CORE = {cpu: min(cpu % 4, cpu) for cpu in range(8)}  # 0 and 4 are one core


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(cores, "_core", THREADS_OF_A_CORE.__getitem__)


def shares(*offers):
    return [cores.share(offers, rank) for rank in range(len(offers))]


def test_ranks_of_a_node_get_as_many_whole_cores_each_and_none_twice():
    a, b = ("a", tuple(range(8))), ("b", tuple(range(8)))
    assert shares(a, a, b, b) == [[0, 4, 1, 5], [2, 6, 3, 7]] * 2, "the node's ranks count, not the run's"
    assert shares(*[("a", (0, 1, 2))] * 2) == [[0], [1]]


def test_who_was_given_cores_of_his_own_keeps_them_all():
    assert shares(("a", (0, 4)), ("a", (1, 5)), ("a", (2, 3)), ("a", (2, 3))) == [[0, 4], [1, 5], [2], [3]]


def test_more_ranks_than_cores_get_one_each_in_turn():
    assert shares(*[("a", (2, 3))] * 3) == [[2], [3], [2]]


def test_what_is_offered_lies_beside_the_device_where_the_launcher_allows_it(monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    for near, offered in (({2, 3, 6, 7}, (2, 3)), ({6, 7}, (0, 1, 2, 3)), (set(), (0, 1, 2, 3))):
        monkeypatch.setattr(cores, "_near_device", lambda near=near: near)
        assert cores.offered() == offered


def test_the_kernel_s_lists_are_read():
    assert cores.cpu_list("0-2,8,10-11\n") == {0, 1, 2, 8, 10, 11}
    assert cores.cpu_list("\n") == set()
