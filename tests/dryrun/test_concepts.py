"""The family dlcm: plan and dry run name the same bytes; its concepts are as many as the dry run is told."""

from typing import Any

import pytest

from llada_megatron.config import rules
from llada_megatron.plan import exact
from tests.distributed import run_ranks
from tests.dryrun.comparing import all_comparisons, assert_same, dry_configuration

SMALL = [  # concepts of a sequence are 66, whose rows in the backbone are padded to 128
    *("experiment=dlcm_parity", "precision=bf16", "model.head_dim=64", "data.sequence_length=264"),
    *("layout.global_batch=16", "cluster.gpus_per_node=16", "cluster.peak_tflops=1"),
]
DENSE, ONE_MICRO_BATCH = "model.dense_layers=4", "layout.global_batch=1"
TP = ["layout.processes=2", "layout.tp=2"]
CASES: dict[str, list[str]] = {
    "tp_ep": ["layout.processes=4", "layout.tp=2", "layout.ep=2", "layout.micro_batch=2"],
}
SLOW_CASES: dict[str, list[str]] = {
    "replicated": [DENSE, ONE_MICRO_BATCH, "model.concepts.attention=replicated"],
    "replicated_tp": [*TP, "model.concepts.attention=replicated"],
    "full_recompute_tp": [*TP, "layout.recompute=full"],
    "other_rate": [ONE_MICRO_BATCH, "model.concepts.tokens_per_concept=3.3", "model.head_chunk_tokens=32"],
    "straight_through": [DENSE, ONE_MICRO_BATCH, "model.concepts.boundary_grad=ste"],
}
MORE_CASES: dict[str, list[str]] = {
    "boundary_token": [DENSE, ONE_MICRO_BATCH, "model.concepts.concept=boundary_token"],
    "ep_overlap": [
        *("layout.processes=2", "layout.ep=2"),
        *("layout.overlap_grad_reduce=true", "layout.overlap_param_gather=true"),
    ],
    "recompute_others": ["layout.recompute=selective", "layout.recompute_modules=[core_attn,mlp,moe]"],
    "fp32": ["precision=fp32"],
    "micro_batch": [DENSE, "layout.micro_batch=2"],
}


def found(cases: dict[str, list[str]]) -> dict[str, list[exact.RankComparison]]:
    return run_ranks(all_comparisons, {name: (0, case) for name, case in cases.items()}, SMALL)[0]


@pytest.mark.parametrize(
    "cases",
    [
        CASES,
        *(
            pytest.param(cases, marks=mark)
            for cases, mark in ((SLOW_CASES, pytest.mark.slow), (MORE_CASES, pytest.mark.full))
        ),
    ],
    ids=["quick", "slow", "full"],
)
def test_the_plan_of_concepts_is_the_dry_run_to_the_byte(cases: dict[str, list[str]]) -> None:
    for (one,) in found(cases).values():
        assert_same(one)


def real_and_fake(overrides: list[str]) -> list[Any]:
    from llada_megatron.dryrun.rank import run_rank

    config = dry_configuration(overrides, SMALL)
    stage = rules.check(config).stages[0]
    return [run_rank(config, stage, 0, 2, fake=fake) for fake in (False, True)]


@pytest.mark.slow
def test_real_tensors_of_concepts_on_a_cpu_are_as_many_bytes_as_fake_ones() -> None:
    real, fake = run_ranks(real_and_fake, ["precision=fp32"])[0]
    assert real.kept == fake.kept and real.static == fake.static
    assert real.peak == fake.peak
