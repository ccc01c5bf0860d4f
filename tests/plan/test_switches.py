"""What the plan makes of each switch: nothing where it is off, and what its formula says where it is on."""

from dataclasses import replace
from typing import Any

import pytest

from llada_megatron.config import rules
from llada_megatron.config.choices import CudaGraphPart, Dispatcher, Dtype, Fp8, LayerSpec, OffloadModule
from llada_megatron.config.schema import Config
from llada_megatron.plan.estimate import Plan, plan
from llada_megatron.plan.layer_time import Block, _paired
from llada_megatron.plan.levers import with_settings
from llada_megatron.plan.peak import beside, forwards_ahead, pairs
from llada_megatron.plan.planner import Planner
from llada_megatron.plan.rates import rates
from llada_megatron.plan.timing import paired_share
from tests.plan.flash import composed


def mini(**settings: Any) -> Config:
    """Of 8 GPUs, one stage; settings by whole name with `__` for the dot."""
    config = composed("experiment=llada2_mini_sft", "cluster=h100_8", "layout=h100_8x_ep8")
    config = replace(config, model=replace(config.model, layer_spec=LayerSpec.transformer_engine))
    return with_settings(config, {name.replace("__", "."): value for name, value in settings.items()})


def planned(config: Config) -> Plan:
    return plan(Planner(config), config.layout, rules.check(config))


def step(**settings: Any) -> float:
    return planned(mini(**settings)).stages[0].step_seconds


def test_each_switch_takes_time_away_and_bf16_numbers_memory() -> None:
    plain = planned(mini())
    whole = plain.stages[0].step_seconds
    assert step(layout__dispatcher=Dispatcher.deepep) < whole
    assert step(layout__overlap_experts=True) < whole
    both = {"layout__overlap_experts": True, "layout__delay_weight_gradients": True}
    assert step(**both) <= step(layout__overlap_experts=True)
    assert step(layout__overlap_shared_experts=True) < whole
    assert step(precision__fp8=Fp8.blockwise) < step(precision__fp8=Fp8.tensorwise) < whole
    assert step(model__fusions=False) > whole
    gradients, moments = (
        planned(mini(**{f"precision__{name}": Dtype.bf16})).fullest.parts for name in ("gradients", "moments")
    )
    assert 2 * gradients["gradients"] == plain.fullest.parts["gradients"]
    assert 3 * moments["optimizer"] == 2 * plain.fullest.parts["optimizer"]  # 4 + 2 + 2 of 4 + 4 + 4 bytes


def test_tensor_parallelism_s_messages_hide_in_products() -> None:
    tp = {"layout__tp": 2, "layout__ep": 4}
    assert step(**tp, layout__overlap_tensor_parallel=True) < step(**tp)


def test_offloading_keeps_less_and_costs_the_host_s_link() -> None:
    modules = [OffloadModule.expert_fc1, OffloadModule.moe_act]
    plain, moved = planned(mini()), planned(mini(layout__offload_modules=modules))
    assert moved.fullest.activations["experts"] < plain.fullest.activations["experts"] / 2
    slow = mini(layout__offload_modules=modules)
    slow = replace(slow, cluster=replace(slow.cluster, host_gb_per_sec=1.0))
    assert planned(slow).stages[0].seconds["host"] > 0


def test_a_host_that_starts_kernels_slowly_sets_the_pace_and_graphs_start_fewer() -> None:
    def slow(**settings: Any) -> float:
        config = mini(**settings)
        return planned(replace(config, cluster=replace(config.cluster, launch_us=500))).stages[0].step_seconds

    assert slow() > 2 * step()
    graphs = [CudaGraphPart.moe_router, CudaGraphPart.moe_preprocess]
    router = {"training__figures_every_steps": 0}
    assert slow(training__cuda_graphs=graphs, **router) < slow(**router)


def test_what_runs_beside_the_exchange_is_what_megatron_core_puts_there() -> None:
    block = Block()
    for direction, before, experts, exchange in ((block.forward, 2, 3, 4), (block.backward, 5, 7, 6)):
        direction.add("attention", "gemm", before)
        direction.add("experts", "expert gemm", experts)
        direction.add("exchange", "ep", exchange)
    at = replace(rates(mini()), exchange_overlap=1.0)
    # back combines 3 beside 2, forward dispatches 2 beside 7, back dispatches 3 beside 3, forward combines 2
    # beside 5
    assert _paired(block, at, delayed=False) == 2 + 2 + 3 + 2
    # weight gradients of 3 leave the second for the third
    assert _paired(block, at, delayed=True) == 2 + 2 + 3 + 2
    block.backward.add("exchange", "ep", 6)  # 6 beside 2 and 3, or 2 and 6
    assert _paired(block, at, delayed=False) == 2 + 2 + 3 + 2
    assert _paired(block, at, delayed=True) == 2 + 2 + 6 + 2
    assert _paired(block, replace(at, exchange_overlap=0.5), delayed=True) == 6


def test_micro_batches_that_fill_and_drain_the_pipeline_run_alone() -> None:
    layout = replace(mini().layout, overlap_experts=True)
    assert paired_share(layout, 0, 16) == 15 / 16
    deep = replace(layout, pp=4, vpp=2)
    assert forwards_ahead(4, 3, 2, 8, overlapped=True) == 4 + 1
    assert paired_share(deep, 3, 8) == 1 - 5 / 16 > paired_share(deep, 0, 8) == 1 - 11 / 16
    assert paired_share(replace(deep, overlap_experts=False), 3, 8) == 0


def test_a_forward_beside_a_backward_needs_less_than_two_micro_batches() -> None:
    assert set(pairs(1, 0, 1, 16)) == {((1,), 0, 0)}
    assert set(pairs(1, 0, 1, 1)) == {((1,), None, 0)}  # a single one has none beside it
    assert ((3, 2), 0, 1) in pairs(2, 0, 2, 8)  # 2 + 2 + 1 run ahead, two of each virtual stage by turns
    config = mini(layout__overlap_experts=True)
    planner = Planner(config)
    (stage, *_), (contents,) = rules.check(config).stages, planner.place(config.layout).contents[0]
    _, units = planner.sizes(config.layout, stage)
    assert beside(units, None, replace(contents, dense=0, moe=0, first=False, last=False)) == 0
    over_one = beside(units, contents, contents)
    assert units.moe.kept < over_one < units.kept(contents) / 2


def test_the_plan_lists_what_switches_take_for_granted_and_what_they_are_worth(capsys) -> None:
    from llada_megatron.plan.report import print_plan

    config = mini(layout__dispatcher=Dispatcher.deepep, layout__overlap_experts=True)
    result = planned(config)
    print_plan(result, config)
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "a token goes to 3.6 of 8 processes",
        "hides 85% of the exchange",
        "starts a kernel in 8 us",
    ):
        assert words in said
    assert "What would raise MFU most" in said and "layout.dispatcher=alltoall" in said
    whole = result.stages[0].step_seconds
    for effect in result.effects:
        assert effect.is_on or effect.step_seconds >= whole
    (without,) = (each for each in result.effects if each.overrides == ("layout.dispatcher=alltoall",))
    assert without.step_seconds == pytest.approx(step(layout__overlap_experts=True))
