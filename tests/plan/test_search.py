"""The search lists what training would accept, in one order, and names what it leaves out."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.config import rules
from llada_megatron.config.schema import Config, LayoutConfig, Recompute
from llada_megatron.plan.estimate import plan
from llada_megatron.plan.planner import Planner
from llada_megatron.plan.search import RECOMPUTE, Result, Search, balanced_stages, describe
from tests.plan.flash import composed


def mini(*overrides: str) -> Config:
    return composed("experiment=llada2_mini_cpt", "cluster=h100_64", *overrides)


@pytest.fixture(scope="module")
def found() -> Result:
    return Search(Planner(mini())).run()


def test_every_result_is_accepted_by_the_rules_of_training_and_fits(found: Result) -> None:
    assert len(found.candidates) > 100
    for one in found.candidates:
        rules.check(replace(mini(), layout=one.layout))
        assert one.layout.processes == 64 and one.peak_bytes <= found.usable_bytes


def test_a_second_search_gives_the_same(found: Result) -> None:
    again = Search(Planner(mini())).run()
    assert again.candidates == found.candidates and again.rejections == found.rejections


def test_results_are_ranked_and_each_is_listed_once(found: Result) -> None:
    hours = [one.hours for one in found.candidates]
    assert hours == sorted(hours)
    names = [describe(one.layout) for one in found.candidates]
    assert len(set(names)) == len(names)


def test_the_figures_are_those_of_a_plan(found: Result) -> None:
    for one in found.candidates[:: len(found.candidates) // 7]:
        config = replace(mini(), layout=one.layout)
        planned = plan(Planner(config), one.layout, rules.check(config))
        assert planned.hours == pytest.approx(one.hours)
        assert planned.tokens_per_sec == pytest.approx(one.tokens_per_sec)
        assert planned.fullest.peak == one.peak_bytes


def test_reasons_name_settings_and_memory(found: Result) -> None:
    assert found.rejections["layout.tp does not divide model.kv_heads"].example.startswith("tp 8")
    memory = found.rejections["does not fit into memory even with full recompute"]
    assert memory.needed is not None and memory.needed > found.usable_bytes
    assert f"{memory.needed / 1e9:.1f} GB of 72.0" in memory.example


def test_every_axis_is_searched(found: Result) -> None:
    layouts = [one.layout for one in found.candidates]
    for axis in ("tp", "pp", "vpp", "cp", "ep", "etp", "micro_batch"):
        assert len({getattr(layout, axis) for layout in layouts}) > 1, axis
    assert len({layout.recompute for layout in layouts}) > 1
    assert any(layout.pipeline for layout in layouts)


def test_a_layout_takes_the_fastest_recompute_that_fits() -> None:
    config = mini("model.layer_spec=transformer_engine", "cluster.memory_gb=40")
    planner = Planner(config)
    taken = {one.layout.recompute: one.layout for one in Search(Planner(config)).run().candidates}
    assert set(taken) == set(Recompute)
    for layout in taken.values():
        plans = []
        for recompute, modules in RECOMPUTE:
            other = replace(layout, recompute=recompute, recompute_modules=list(modules or ["core_attn"]))
            plans.append(plan(planner, other, rules.check(replace(config, layout=other))))
        fastest = min((one for one in plans if one.fits), key=lambda one: one.hours)
        assert describe(fastest.layout) == describe(layout)


def test_a_global_batch_that_no_micro_batch_divides_is_a_reason() -> None:
    reasons = Search(Planner(mini("layout.global_batch=64"))).run().rejections
    assert "layout.global_batch is not a multiple of micro_batch*dp (stage warmup_1)" in reasons
    assert any(reason.startswith("layout.vpp needs micro-batches per step") for reason in reasons)


def test_nothing_fits_into_tiny_memory() -> None:
    result = Search(Planner(mini("cluster.memory_gb=2"))).run()
    assert not result.candidates and result.rejections


def test_a_dense_model_is_searched_without_expert_axes() -> None:
    config = mini("model.dense_layers=20", "model.experts=0", "layout.ep=1")
    layouts = [one.layout for one in Search(Planner(config)).run().candidates]
    assert layouts and {layout.ep for layout in layouts} == {layout.etp for layout in layouts} == {1}


@given(layers=st.integers(8, 40), pp=st.integers(2, 8), vpp=st.integers(1, 3), head=st.floats(0, 5))
def test_balanced_stages_hold_every_layer_and_no_rank_could_give_one_away(layers, pp, vpp, head) -> None:
    if pp * vpp > layers:
        return
    stages = balanced_stages(layers, pp, vpp, head)
    assert sum(stages) == layers and min(stages[:-1]) >= 1 and len(stages) == pp * vpp
    work = [sum(stages[rank::pp]) + (head if rank == pp - 1 else 0) for rank in range(pp)]
    gives = [rank for rank in range(pp) if sum(stages[rank::pp]) > (vpp if rank < pp - 1 else vpp - 1)]
    for rank in gives:
        assert work[rank] - 1 <= min(work) + 1e-9


def test_a_layout_is_described_in_one_line() -> None:
    layout = LayoutConfig(
        tp=2, pp=4, pipeline=[9, 9, 9, 5], recompute=Recompute.selective, recompute_modules=["mlp", "moe"]
    )
    assert describe(layout) == "tp 2, pp 4, micro-batch 1, stages 3x9 5, recompute mlp moe"
