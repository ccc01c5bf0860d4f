"""Static bytes and peaks against a dry run of megatron-core; in-flight counts against its schedules."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.config.schema import LayoutConfig
from llada_megatron.plan.memory import Kept, padded_buffers, static_bytes
from llada_megatron.plan.peak import in_flight
from tests.plan.flash import LAYOUT, held_by


def test_static_bytes_are_those_of_the_dry_run() -> None:
    static = static_bytes(held_by(0), LAYOUT, Kept(2))
    assert static["weights"] == 2571243520 + 8 * 7 * 256  # expert_bias and counts of 7 MoE layers
    assert static["gradients"] == 5142487040
    assert static["optimizer"] == 3 * 370477120


@pytest.mark.parametrize(("rank", "live"), [(0, 8825176264), (1, 7318177992), (3, 9279859272)])
def test_static_bytes_add_up_to_what_was_alive(rank: int, live: int) -> None:
    static = static_bytes(held_by(rank), LAYOUT, Kept(2))
    assert sum(static.values()) == live - 8  # a scalar of that run


def test_fp32_weights_need_no_master() -> None:
    held, layout = replace(held_by(0), bias=0, counts=0, buffers=((1024, 0),)), LayoutConfig(processes=4)
    static = static_bytes(held, layout, Kept(4))
    assert static == {"weights": 4096, "gradients": 4096, "optimizer": 8 * 256}
    assert static_bytes(held, layout, Kept(2))["optimizer"] == 12 * 256
    assert static_bytes(held, layout, Kept(4, averages=True))["optimizer"] == 12 * 256


@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=3), dp=st.sampled_from([1, 3, 4, 64]))
def test_buffers_are_padded_to_what_their_processes_can_share_evenly(sizes, dp) -> None:
    held = replace(held_by(0), buffers=tuple((size, 0) for size in sizes))
    padded, _ = padded_buffers(held, LayoutConfig(processes=dp))
    assert padded % dp == padded % 128 == 0
    assert sum(sizes) <= padded < sum(sizes) + len(sizes) * math.lcm(dp, 128)


def live_by_hand(pp: int, rank: int, vpp: int, micro_batches: int) -> set[tuple[int, ...]]:
    """Counts after every forward of the order that megatron-core's schedule table prescribes."""
    order = [
        chunk
        for start in range(0, micro_batches, pp)
        for chunk in range(vpp)
        for _ in range(start, start + pp)
    ]
    backward = [vpp - 1 - chunk for chunk in order]
    ahead = min((pp - rank - 1) * 2 + (vpp - 1) * pp, len(order))
    live, seen = [0] * vpp, set()
    for index, chunk in enumerate(order):
        live[chunk] += 1
        seen.add(tuple(live))
        if index >= ahead:
            live[backward[index - ahead]] -= 1
    return seen


@given(pp=st.integers(2, 5), vpp=st.integers(2, 4), rounds=st.integers(1, 6), data=st.data())
def test_interleaved_pipelines_hold_the_schedules_largest_counts(pp, vpp, rounds, data) -> None:
    rank = data.draw(st.integers(0, pp - 1))
    weights = data.draw(st.lists(st.integers(1, 9), min_size=vpp, max_size=vpp))
    largest = max(
        sum(count * weight for count, weight in zip(live, weights, strict=True))
        for live in live_by_hand(pp, rank, vpp, rounds * pp)
    )
    assert largest == max(
        sum(count * weight for count, weight in zip(live, weights, strict=True))
        for live in in_flight(pp, rank, vpp, rounds * pp)
    )


@pytest.mark.parametrize(("rank", "micro_batches", "count"), [(0, 8, 4), (3, 8, 1), (0, 2, 2), (1, 8, 3)])
def test_one_forward_one_backward_holds_a_micro_batch_per_following_stage(rank, micro_batches, count) -> None:
    assert in_flight(4, rank, 1, micro_batches) == ((count,),)
