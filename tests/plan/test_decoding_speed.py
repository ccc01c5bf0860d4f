"""A planned forward of decoding at its limits: bytes of few rows, FLOPs of many, messages of more ranks."""

from dataclasses import replace

import numpy as np
import pytest

from llada_megatron.config.families.gpt import active_weights
from llada_megatron.config.schema import Dispatcher
from llada_megatron.plan.decoding_speed import (
    Forward,
    Workload,
    decoding_layout,
    forward_of,
    forward_shape,
    plan_decoding,
)
from llada_megatron.plan.decoding_work import decoding_messages, expected_touched
from llada_megatron.plan.planner import Planner
from tests.plan.flash import composed, config_with

WORKLOAD = Workload(block_size=32, context=4096, branches=3, tokens_per_forward=3.0)
PRODUCTS = ("attention's products", "dense layers", "shared experts", "routers", "experts", "head")


def mini(**layout: object) -> Planner:
    """LLaDA2-mini on 64 GPUs, experts on one rank unless said otherwise."""
    config = composed("experiment=llada2_mini_cpt", "cluster=h100_64")
    return Planner(config_with(config, **({"ep": 1} | layout)))


def forward(
    planner: Planner, workload: Workload = WORKLOAD, *, tp: int = 1, bp: int = 1, batch: int = 1
) -> Forward:
    return forward_of(planner, decoding_layout(planner.config, workload, tp, bp), workload, batch)


def weights_of_a_row(planner: Planner) -> int:
    """That one row passes, the head among them."""
    model = planner.model
    return sum(active_weights(model).values()) + model.vocab_size * model.hidden_size


def test_one_row_takes_as_long_as_its_bytes() -> None:
    planner = mini()
    found = forward(planner, Workload(block_size=1, context=4096))
    assert found.rows == 1
    assert sum(found.work[name].bytes for name in PRODUCTS) == pytest.approx(2 * weights_of_a_row(planner))
    assert found.work["attention"].bytes == 2 * 20 * 4 * 128 * 2 * 4096  # layers, heads of keys, channels
    in_all = sum(each.bytes for each in found.work.values())
    assert found.seconds == {"compute": 0.0, "memory": pytest.approx(in_all / (3350e9 * 0.8))}


def test_many_rows_take_as_long_as_their_flops() -> None:
    planner = mini()
    found = forward(planner, batch=4096)
    in_all = sum(found.work[name].flops for name in PRODUCTS)
    assert in_all == pytest.approx(2 * found.rows * weights_of_a_row(planner))
    experts = found.work["experts"].flops
    seconds = (in_all - experts) / (989.4e12 * 0.65) + experts / (989.4e12 * 0.45)
    assert sum(found.work[name].seconds(planner.rates.memory) for name in PRODUCTS) == pytest.approx(seconds)
    assert found.seconds["compute"] == pytest.approx(seconds)


def test_all_experts_are_read_for_many_rows_and_none_twice() -> None:
    planner = mini()
    model = planner.model
    all_of_them = 2 * 3 * model.hidden_size * model.expert_hidden_size * model.experts * 19
    assert forward(planner, batch=64).work["experts"].bytes == pytest.approx(all_of_them)
    shared_out = forward(mini(ep=8), batch=64)
    assert shared_out.work["experts"].bytes == pytest.approx(all_of_them / 8)
    few = Workload(block_size=4, context=4096)  # of eight replicas, which send them to each other's experts
    of_one = all_of_them / model.experts
    here = forward(mini(ep=8), few).work["experts"].bytes
    assert here == pytest.approx(of_one * expected_touched(256, 8, 4 * 8) / 8)
    assert forward(planner).weight_bytes - shared_out.weight_bytes == pytest.approx(
        all_of_them * 7 / 8, rel=1e-4
    )


@pytest.mark.parametrize(
    ("experts", "per_row", "rows"), [(256, 8, 1), (256, 8, 32), (64, 2, 50), (16, 16, 3)]
)
def test_experts_that_rows_touch_are_those_of_a_simulation(experts: int, per_row: int, rows: int) -> None:
    draws, random = 400, np.random.default_rng(0)
    chosen = random.random((draws, rows, experts)).argpartition(per_row - 1, axis=-1)[..., :per_row]
    touched = [len(np.unique(of_draw)) for of_draw in chosen]
    error = np.std(touched) / np.sqrt(draws)
    assert abs(np.mean(touched) - expected_touched(experts, per_row, rows)) <= 4 * error + 1e-9


def test_blocks_with_pools_touch_fewer() -> None:
    plain, capacity, blocks = mini(), 32, 4
    pools = Planner(replace(plain.config, model=replace(plain.model, expert_capacity=capacity)))
    free, pooled = (forward(each).work["experts"].bytes for each in (plain, pools))
    of_one = free / expected_touched(256, 8, 128)
    random, draws = np.random.default_rng(0), 200
    touched = []
    for _ in range(draws):
        of_blocks = [random.permutation(256)[:capacity] for _ in range(blocks)]
        touched.append(
            len({random.permutation(pool)[n] for pool in of_blocks for _ in range(32) for n in range(8)})
        )
    assert pooled < free and pooled / of_one == pytest.approx(np.mean(touched), rel=0.02)


def test_branch_parallelism_halves_rows_and_asks_for_figures() -> None:
    planner = mini()
    one, two, four = (forward(planner, bp=bp, batch=8) for bp in (1, 2, 4))
    assert (one.rows, two.rows, four.rows) == (1024, 512, 256)
    assert one.total_seconds > two.total_seconds > four.total_seconds
    assert one.weight_bytes == two.weight_bytes and one.cache_bytes > two.cache_bytes > four.cache_bytes
    assert "bp" not in one.seconds and two.seconds["bp"] > 0
    assert two.work["attention"].bytes == one.work["attention"].bytes / 2
    assert one.jobs * one.processes == two.jobs * two.processes == 64


def test_tensor_parallelism_holds_and_reads_less_and_sends_more() -> None:
    planner = mini()
    one, two, four = (forward(planner, tp=tp, batch=8) for tp in (1, 2, 4))
    assert one.message_seconds == 0 < two.message_seconds < four.message_seconds
    assert one.seconds["memory"] > two.seconds["memory"] > four.seconds["memory"]
    assert one.weight_bytes > two.weight_bytes > four.weight_bytes
    assert one.work["experts"].flops == 2 * two.work["experts"].flops == 4 * four.work["experts"].flops
    assert one.cache_bytes == 2 * two.cache_bytes == 4 * four.cache_bytes


def test_messages_are_those_of_every_layer() -> None:
    planner = mini(ep=8, dispatcher=Dispatcher.alltoall)
    model, layout = planner.model, decoding_layout(planner.config, WORKLOAD, 4, 1)
    shape = forward_shape(planner, layout, WORKLOAD, 128)
    calls: dict[tuple[str, str], int] = {}
    for times, message in decoding_messages(model, shape, layout, b=2):
        name = message.group, message.operation
        calls[name] = calls.get(name, 0) + times
    # Attention and a feed-forward part gather and scatter; so do the head and the embedding.
    assert calls["tp", "all_gather"] == calls["tp", "reduce_scatter"] == 2 * 20 + 1
    assert calls["tp", "all_reduce"] == 3
    assert calls["ep", "all_to_all"] == 3 * 19 and calls["ep*etp", "all_gather"] == 19


def test_tokens_per_second_are_those_of_all_sequences() -> None:
    found = forward(mini(ep=8), tp=2, bp=2, batch=8)
    assert (found.processes, found.jobs) == (8, 8)
    assert found.tokens_per_sec_per_sequence == pytest.approx(3 / found.total_seconds)
    assert found.tokens_per_sec == pytest.approx(64 / 4 * 8 * found.tokens_per_sec_per_sequence)


def test_what_does_not_fit_is_said() -> None:
    flash = composed("experiment=llada2_flash_cpt", "cluster=h100_512")
    assert not forward(Planner(config_with(flash, ep=2))).fits
    assert forward(Planner(config_with(flash, ep=16))).fits
    long = replace(WORKLOAD, context=2**19)
    assert forward(mini(), long).fits and not forward(mini(), long, batch=2).fits


def test_the_table_has_what_model_and_branches_allow() -> None:
    def pairs(**given: list[int]) -> list[tuple[int, int]]:
        return [(each.tp, each.bp) for each in plan_decoding(mini(), WORKLOAD, batches=[1], **given)]

    assert pairs() == [(tp, bp) for tp in (1, 2, 4) for bp in (1, 2, 4)]  # four heads of keys
    assert pairs(bps=[2]) == [(1, 2), (2, 2), (4, 2)]
    assert pairs(tps=[4], bps=[4, 1]) == [(4, 4), (4, 1)]
