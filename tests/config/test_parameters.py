"""Parameter counts are exact: published totals, and what a dry run of megatron-core counted on ranks."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.config.compose import compose
from llada_megatron.config.contents import Contents
from llada_megatron.config.errors import BadInput
from llada_megatron.config.families.gpt import check, parameters, stage_contents
from llada_megatron.config.parameters import active_parameters, total_parameters
from llada_megatron.config.schema import LayoutConfig
from tests.plan.flash import held_by, model_of

TOTALS = {"mini": 16_255_643_392, "flash": 102_889_705_216}


def attention(H: int, heads: int, kv_heads: int, D: int) -> int:
    """Of a layer: projections of Q, K and V, and back."""
    return H * D * (2 * heads + 2 * kv_heads)


def latent_attention(H: int, heads: int, Rq: int, R: int, nope: int, rope: int, v: int) -> int:
    """q_a, q_b, kv_a_proj_with_mqa, kv_b and o_proj, and two norms."""
    queries, joined = H * Rq + Rq + Rq * heads * (nope + rope), H * (R + rope) + R
    return queries + joined + R * heads * (nope + v) + heads * v * H


OTHERS = {
    "qwen3_0_6b": 28 * (attention(1024, 16, 8, 128) + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128)
    + 151936 * 1024
    + 1024,
    "qwen3_8b": 8_190_735_360,
    "qwen3_30b_a3b": 30_532_122_624,
    "dream_7b": 7_615_616_512,
    "llada_8b": 8_015_581_184,
    "llada_moe_7b_a1b": 16
    * (attention(2048, 16, 16, 128) + 64 * (3 * 2048 * 1024 + 2048) + 2 * 2048 + 2 * 128)
    + 2 * 157184 * 2048
    + 2048,
    "deepseek_v3": 61 * (latent_attention(7168, 128, 1536, 512, 128, 64, 128) + 2 * 7168)
    + 3 * (3 * 7168 * 18432)
    + 58 * (257 * 3 * 7168 * 2048 + 256 * 7168 + 256)  # a shared expert, and e_score_correction_bias
    + 2 * 129280 * 7168
    + 7168,
}
"""Published numbers of parameters, or sums over the tensors of the public layout."""


@pytest.mark.parametrize("name", OTHERS)
def test_presets_of_other_families_have_every_parameter(name: str) -> None:
    model = compose(["experiment=parity", f"model={name}"]).model
    check(model)
    assert total_parameters(model) == OTHERS[name]


def test_deepseek_v3_has_the_number_of_parameters_that_its_name_says() -> None:
    assert OTHERS["deepseek_v3"] == 671_026_419_200


WRONG = [
    ("llada_moe_7b_a1b", dict(expert_bias=True), "softmax needs model.expert_bias=false"),
    ("qwen3_30b_a3b", dict(expert_groups=2), "softmax scores model.expert_groups=2 by shares of all experts"),
    ("qwen3_30b_a3b", dict(experts_per_token=1), "set model.normalize_expert_weights=false"),
    ("llada2_mini", dict(normalize_expert_weights=False), "needs model.expert_score=softmax, not sigmoid"),
    ("qwen3_30b_a3b", dict(expert_capacity=16), "needs model.expert_bias=true: pools are chosen by biased"),
]


@pytest.mark.parametrize("name, changed, sentence", WRONG)
def test_scores_that_cannot_be_served_are_a_sentence(name: str, changed: dict, sentence: str) -> None:
    model = compose(["experiment=parity", f"model={name}"]).model
    with pytest.raises(BadInput, match=sentence):
        check(replace(model, **changed))


@pytest.mark.parametrize("name", TOTALS)
def test_totals_are_the_published_ones(name: str) -> None:
    assert total_parameters(model_of(name)) == TOTALS[name]


@pytest.mark.parametrize(
    ("rank", "sharded", "replicated", "expert"),
    [
        (0, 573571072, 7407616, 704643072),
        (1, 201326592, 8456192, 805306368),
        (2, 201326592, 8456192, 805306368),
        (3, 523239424, 8460288, 805306368),
    ],
)
def test_pipeline_ranks_hold_what_megatron_core_counted(rank, sharded, replicated, expert) -> None:
    held = held_by(rank)
    assert (held.sharded, held.replicated, held.expert) == (sharded, replicated, expert)


ways = st.sampled_from([1, 2, 4])


@given(tp=ways, ep=st.sampled_from([1, 8, 32]), etp=ways, data=st.data())
def test_what_all_processes_hold_adds_up_to_the_total_under_uneven_stages(tp, ep, etp, data) -> None:
    model = model_of("mini")
    pp, vpp = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2), (3, 2)]))
    cuts = data.draw(
        st.lists(st.integers(1, 19), min_size=pp * vpp - 1, max_size=pp * vpp - 1, unique=True).map(sorted)
    )
    edges = [0, *cuts, model.layers]
    pipeline = [stop - start for start, stop in pairwise(edges)]
    layout = LayoutConfig(tp=tp, ep=ep, etp=etp, pp=pp, vpp=vpp, pipeline=pipeline)
    held = [parameters(model, stages, tp=tp, ep=ep, etp=etp) for stages in stage_contents(model, layout)]
    whole = sum(one.sharded * tp + one.replicated + one.expert * ep * etp + one.bias for one in held)
    assert whole == TOTALS["mini"]


def test_a_tied_head_counts_once_on_one_stage_and_is_a_copy_on_two() -> None:
    model = replace(model_of("mini"), tied_head=True)
    table = model.vocab_size * model.hidden_size
    assert total_parameters(model) == TOTALS["mini"] - table
    first, last = (parameters(model, stages) for stages in stage_contents(model, LayoutConfig(pp=2)))
    assert first.trained + last.trained + first.bias + last.bias == TOTALS["mini"]


def test_a_dense_model_has_no_experts_no_router_and_no_bias() -> None:
    model = replace(model_of("mini"), dense_layers=20, experts=0)
    held = parameters(model, *stage_contents(model, LayoutConfig()))
    assert (held.expert, held.bias) == (0, 0)
    assert held.replicated == 20 * (2 * 2048 + 2 * 128) + 2048


def test_virtual_stages_go_round_the_pipeline_ranks() -> None:
    layout = LayoutConfig(pp=2, vpp=2, pipeline=[3, 6, 6, 5])
    assert stage_contents(model_of("mini"), layout) == [
        [Contents(1, 2, True, False), Contents(0, 6, False, False)],
        [Contents(0, 6, False, False), Contents(0, 5, False, True)],
    ]


def test_a_token_has_to_do_with_the_experts_that_it_chooses() -> None:
    # Ling-flash-2.0's card says 6.1B, Ling-mini-2.0's 1.4B.
    assert active_parameters(model_of("flash")) == 6_152_277_760
    assert active_parameters(model_of("mini")) == 1_432_973_056
    dense = replace(model_of("mini"), dense_layers=model_of("mini").layers)
    assert active_parameters(dense) == total_parameters(dense)
