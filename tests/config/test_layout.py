"""The process grid is megatron-core's, and what a layout cannot do is refused with what would work."""

import re
from dataclasses import asdict, replace
from functools import cache
from math import lcm, prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from llada_megatron.config import rules
from llada_megatron.config.choices import RecomputeModule
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.config.layout import (
    DENSE_AXES,
    EXPERT_AXES,
    coordinates,
    data_parallel_size,
    expert_data_parallel_size,
    micro_batches_per_step,
    pipeline_stages,
    rank_at,
)
from llada_megatron.config.schema import Config, Dispatcher, Dtype, LayoutConfig, OffloadModule, Recompute
from tests.distributed import run_ranks

# Ranks and coordinates


def in_megatron_core(layout: LayoutConfig) -> tuple[dict[str, int], int, int]:
    """This rank's coordinates, and the sizes of the two data-parallel groups."""
    from llada_megatron.parallel import groups

    groups.initialize(layout)
    from megatron.core import parallel_state as state

    torch.distributed.barrier()  # whoever is first would hang up on one that still makes its groups
    return (
        {
            "tp": state.get_tensor_model_parallel_rank(),
            "cp": state.get_context_parallel_rank(),
            "dp": state.get_data_parallel_rank(),
            "pp": state.get_pipeline_model_parallel_rank(),
            "etp": state.get_expert_tensor_parallel_rank(),
            "ep": state.get_expert_model_parallel_rank(),
            "expert_dp": state.get_expert_data_parallel_rank(),
        },
        state.get_data_parallel_world_size(),
        state.get_expert_data_parallel_world_size(),
    )


@pytest.mark.parametrize(
    "layout",
    [
        LayoutConfig(processes=4, tp=2, cp=2, ep=4),
        LayoutConfig(processes=4, tp=2, ep=2, etp=1),
        LayoutConfig(processes=4, pp=2, ep=2),
        LayoutConfig(processes=4, tp=2, ep=2, etp=2),
        LayoutConfig(processes=8, tp=2, cp=2, pp=2, ep=2),
        LayoutConfig(processes=8, cp=2, ep=2, etp=2),
    ],
    ids=lambda layout: " ".join(f"{k}{v}" for k, v in vars(layout).items() if type(v) is int and v > 1),
)
def test_coordinates_are_megatron_cores(layout: LayoutConfig) -> None:
    for rank, (found, dp, expert_dp) in enumerate(
        run_ranks(in_megatron_core, layout, processes=layout.processes)
    ):
        assert asdict(coordinates(layout, rank)) == found
        assert (data_parallel_size(layout), expert_data_parallel_size(layout)) == (dp, expert_dp)


small = st.integers(1, 3)


@given(tp=small, cp=small, dp=small, pp=small, etp=small, ep=small)
def test_every_rank_has_coordinates_of_its_own_in_both_grids(tp, cp, dp, pp, etp, ep) -> None:
    layout = LayoutConfig(processes=tp * cp * dp * pp * etp * ep, tp=tp, cp=cp, pp=pp, etp=etp, ep=ep)
    for axes in (DENSE_AXES, EXPERT_AXES):
        for rank in range(layout.processes):
            found = asdict(coordinates(layout, rank))
            assert rank_at(layout, **{axis: found[axis] for axis in axes}) == rank


def test_coordinates_of_no_grid_are_an_error() -> None:
    with pytest.raises(BadInput, match=r"\['ep', 'tp'\] are the axes of no grid"):
        rank_at(LayoutConfig(), tp=0, ep=0)


# Refusals


@cache
def parity() -> Config:
    return compose(["experiment=parity"])


def parity_with(overrides: list[str]) -> Config:
    """As hydra would compose it, a hundred times faster."""
    merged = OmegaConf.merge(OmegaConf.structured(parity()), OmegaConf.from_dotlist(overrides))
    return OmegaConf.to_object(merged)


def two(*overrides: str) -> list[str]:
    return ["layout.processes=2", *overrides]


BROKEN = [  # overrides, what the message says, and one of its proposals, which must then be accepted
    (
        ["layout.processes=3", "layout.tp=2"],
        "layout.processes=3 is not a multiple of layout.tp*pp*cp=2: use 4 processes, or smaller tp, pp, cp.",
        ["layout.processes=4"],
    ),
    (
        two("layout.ep=2", "layout.pp=2"),
        "layout.processes=2 is not a multiple of layout.ep*etp*pp=4: use 4 processes, or smaller ep, etp",
        ["layout.processes=4"],
    ),
    (
        ["layout.processes=4", "layout.tp=4"],
        "layout.tp=4 does not divide model.kv_heads=2: use a layout.tp of 1, 2.",
        ["layout.tp=2"],
    ),
    (
        ["layout.processes=6", "layout.tp=3", "layout.global_batch=6"],
        "layout.tp=3 does not divide model.heads=4: use a layout.tp of 1, 2.",
        ["layout.tp=1"],
    ),
    (
        two("layout.tp=2", "model.vocab_size=511"),
        "does not divide model.vocab_size=511: use a layout.tp of 1, or pad model.vocab_size to 512.",
        ["model.vocab_size=512"],
    ),
    (two("layout.tp=2", "model.ffn_hidden_size=255"), "model.ffn_hidden_size=255", ["layout.tp=1"]),
    (
        two("layout.tp=2", "model.shared_expert_hidden_size=63"),
        "model.shared_expert_hidden_size=63",
        ["layout.tp=1"],
    ),
    (
        ["layout.processes=6", "layout.ep=6", "layout.global_batch=6"],
        "layout.ep=6 does not divide model.experts=8: use a layout.ep of 1, 2.",
        ["layout.ep=2"],
    ),
    (
        ["layout.processes=3", "layout.etp=3", "layout.global_batch=6"],
        "layout.etp=3 does not divide model.expert_hidden_size=64: use a layout.etp of 1.",
        ["layout.etp=1"],
    ),
    (
        two("layout.ep=2", "model.dense_layers=4", "model.experts=0"),
        "layout.ep=2 divides experts, but no layer has any: set layout.ep=1.",
        ["layout.ep=1"],
    ),
    (
        two("layout.etp=2", "model.dense_layers=4", "model.experts=0"),
        "layout.etp=2 divides experts, but no layer has any: set layout.etp=1.",
        ["layout.etp=1"],
    ),
    (["layout.vpp=2"], "set layout.vpp=1, or layout.pp above 1", two("layout.pp=2")),
    (
        ["layout.pp=8", "layout.processes=8"],
        "layout.pp*vpp=8 is more than model.layers=4: use at most 4 stages.",
        ["layout.pp=4"],
    ),
    (
        ["layout.pp=3", "layout.processes=3"],
        "model.layers=4 is not a multiple of layout.pp*vpp=3: give the layers of each stage, for example"
        " layout.pipeline=[2,1,1].",
        ["layout.pipeline=[2,1,1]"],
    ),
    (
        two("layout.pp=2", "layout.pipeline=[4]"),
        "layout.pipeline=[4] has 1 entries, not one for each of pp*vpp=2 stages: give 2.",
        ["layout.pipeline=[3,1]"],
    ),
    (
        two("layout.pp=2", "layout.pipeline=[3,2]"),
        "layout.pipeline=[3, 2] adds up to 5, not to model.layers=4: change an entry by -1.",
        ["layout.pipeline=[3,1]"],
    ),
    (
        two("layout.pp=2", "layout.vpp=2", "layout.pipeline=[2,0,1,1]"),
        "layout.pipeline=[2, 0, 1, 1] leaves a stage without layers: only the first, which embeds, and",
        ["layout.pipeline=[0,2,2,0]"],
    ),
    (two("layout.pp=2", "layout.pipeline=[5,-1]"), "leaves a stage without", ["layout.pipeline=[4,0]"]),
    (
        two("layout.tp=2", "data.sequence_length=127"),
        "data.sequence_length=127 is not a multiple of layout.cp*tp=2",
        ["data.sequence_length=128"],
    ),
    (
        ["layout.processes=3", "layout.cp=3"],
        "data.sequence_length=128 is not a multiple of layout.cp*tp=3",
        two("layout.cp=2"),
    ),
    (
        ["layout.micro_batch=3"],
        "layout.global_batch=8 is not a multiple of micro_batch*dp=3 (stage bdlm_4): make"
        " layout.global_batch 9, or change micro_batch.",
        ["layout.global_batch=9"],
    ),
    (
        ["schedule.stages=[{name: a, block_size: '4', tokens: 4096}, {name: b, block_size: '8', tokens: 4096,"
         " micro_batch: 5}]", "layout.micro_batch=2"],
        "micro_batch*dp=5 (stage b): make layout.global_batch 10",
        ["layout.global_batch=10"],
    ),
    (["layout.micro_batch=3", "layout.processes=4"], "layout.global_batch 12", ["layout.global_batch=12"]),
    (
        two("layout.pp=2", "layout.vpp=2", "layout.global_batch=7"),
        "layout.vpp=2 needs micro-batches per step in multiples of layout.pp=2, but stage bdlm_4 has 7: make"
        " layout.global_batch 8, or layout.vpp 1.",
        ["layout.global_batch=8"],
    ),
    (
        ["layout.overlap_param_gather=true"],
        "layout.overlap_param_gather needs layout.overlap_grad_reduce: set both to true.",
        ["layout.overlap_grad_reduce=true"],
    ),
    (
        ["layout.recompute=selective", "layout.recompute_modules=[]"],
        "layout.recompute_modules is empty while layout.recompute=selective: choose from core_attn,",
        ["layout.recompute_modules=[moe]"],
    ),
    (
        ["layout.recompute=selective", "layout.recompute_modules=[mla_up_proj]"],
        "layout.recompute_modules has 'mla_up_proj', the ways up from latents",
        ["layout.recompute_modules=[core_attn]"],
    ),
    (
        ["layout.recompute=selective", "layout.recompute_modules=[moe_act]"],
        "'moe_act', which needs TransformerEngine: set model.layer_spec=transformer_engine (now auto)",
        ["model.layer_spec=transformer_engine"],
    ),
    (
        two("layout.pp=2", "evaluation.infill_sequences=1"),
        "evaluation.infill_sequences=1 needs layout.pp=1, not 2",
        ["evaluation.infill_sequences=0"],
    ),
    (
        two("layout.cp=2", "evaluation.infill_sequences=1"),
        "evaluation.infill_sequences=1 needs layout.cp=1, not 2",
        ["evaluation.infill_sequences=0"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message", "proposal"), BROKEN, ids=[" ".join(overrides) for overrides, _, _ in BROKEN]
)
def test_a_layout_that_cannot_work_is_refused_and_what_it_proposes_works(
    overrides, message, proposal
) -> None:
    with pytest.raises(BadInput, match=re.escape(message)) as caught:
        rules.check(parity_with(overrides))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    rules.check(parity_with([*overrides, *proposal]))


@pytest.mark.parametrize(
    "overrides",
    [
        two("layout.cp=2"),
        ["layout.processes=16", "layout.cp=16", "data.sequence_length=64"],  # blocks of 32 span ranks of 4
        two("layout.etp=2"),
        ["layout.processes=4", "layout.tp=2", "layout.cp=2", "layout.ep=4"],
        two("layout.pp=2", "layout.pipeline=[4,0]"),
        two("layout.pp=2", "layout.micro_batch=8"),  # one micro-batch for two stages: idle, but right
        ["layout.recompute=selective", "layout.recompute_modules=[core_attn,mlp,moe,shared_experts]"],
        ["layout.recompute=full", "layout.recompute_modules=[moe_act]"],
        two("layout.tp=2", "model.tied_head=true", "model.dense_layers=4", "model.experts=0"),
        two("layout.tp=2", "model.shared_expert_hidden_size=0"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_layout_that_can_work_is_let_through(overrides) -> None:
    rules.check(parity_with(overrides))


# What is let through


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Small layouts, mostly with processes that the axes divide, so that many are accepted."""
    ways = st.sampled_from([1, 1, 2, 2, 2, 4, 3])
    tp, cp, pp, ep, etp = (draw(ways) for _ in range(5))
    vpp = draw(st.sampled_from([1, 1, 2])) if pp > 1 else draw(st.sampled_from([1, 1, 1, 2]))
    whole = lcm(tp * cp * pp, ep * etp * pp)
    processes = draw(st.sampled_from([whole, whole, 2 * whole, 4]))
    pipeline = draw(st.one_of(st.just([]), st.lists(st.integers(0, 3), min_size=pp * vpp, max_size=pp * vpp)))
    layers = draw(st.sampled_from([sum(pipeline) or 4, 4]))
    layout = LayoutConfig(
        tp=tp,
        cp=cp,
        pp=pp,
        vpp=vpp,
        ep=ep,
        etp=etp,
        processes=processes,
        micro_batch=draw(st.integers(1, 2)),
        global_batch=draw(st.sampled_from([6, 8, 48, 96])),
        pipeline=pipeline,
        recompute=draw(st.sampled_from(Recompute)),
        recompute_modules=draw(st.lists(st.sampled_from(list(RecomputeModule)), max_size=2)),
        dispatcher=draw(st.sampled_from(Dispatcher)),
        overlap_grad_reduce=draw(st.sampled_from([True, True, False])),
        overlap_param_gather=draw(st.booleans()),
        overlap_experts=draw(st.sampled_from([False, False, True])),
        overlap_shared_experts=draw(st.sampled_from([False, False, True])),
        offload_modules=draw(st.one_of(st.just([]), st.lists(st.sampled_from(OffloadModule), max_size=3))),
    )
    model = replace(parity().model, layers=max(layers, 2), tied_head=draw(st.booleans()))
    data = replace(parity().data, sequence_length=draw(st.sampled_from([96, 128])))
    precision = replace(parity().precision, dtype=draw(st.sampled_from(Dtype)))
    return replace(parity(), layout=layout, model=model, data=data, precision=precision)


@settings(max_examples=300)
@given(config=configs())
def test_whatever_is_accepted_divides_evenly(config: Config) -> None:
    layout, model, L = config.layout, config.model, config.data.sequence_length
    try:
        schedule = rules.check(config)
    except BadInput as refusal:
        assert re.search(r"layout\.\w+|model\.\w+|data\.\w+|schedule\.", str(refusal))
        return
    assert layout.tp * layout.cp * layout.pp * data_parallel_size(layout) == layout.processes
    assert layout.etp * layout.ep * layout.pp * expert_data_parallel_size(layout) == layout.processes
    for size in (model.heads, model.kv_heads, model.vocab_size, model.ffn_hidden_size):
        assert size % layout.tp == 0
    assert model.shared_expert_hidden_size % layout.tp == 0
    assert model.experts % layout.ep == 0 and model.expert_hidden_size % layout.etp == 0
    stages = pipeline_stages(model.layers, layout)
    assert len(stages) == layout.pp * layout.vpp and sum(stages) == model.layers
    for stage in schedule.stages:
        shard = L * (2 if stage.clean_copy else 1) / (layout.cp * layout.tp)
        assert shard == int(shard) and L % (layout.cp * layout.tp) == 0
        per_pipeline = micro_batches_per_step(layout, stage)
        assert prod((per_pipeline, stage.micro_batch, data_parallel_size(layout))) == layout.global_batch
        assert layout.vpp == 1 or per_pipeline % layout.pp == 0
