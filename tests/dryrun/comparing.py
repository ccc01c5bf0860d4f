"""Small models, dry-run and computed, and what must be the same."""

from dataclasses import asdict

import pytest

from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from llada_megatron.config.schema import Config
from llada_megatron.plan import exact
from llada_megatron.plan.planner import Planner

SMALL = [  # head_dim 64 leaves no padding in a process's share of the optimizer
    *(
        "experiment=parity",
        "precision=bf16",
        "model.head_dim=64",
        "model.layers=3",
        "data.sequence_length=64",
    ),
    *("layout.global_batch=16", "cluster.gpus_per_node=16", "cluster.peak_tflops=1"),
]


def dry_configuration(overrides: list[str], small: list[str] = SMALL) -> Config:
    return exact.dry_configuration(compose([*small, *overrides]))


def comparisons(
    stage_index: int, overrides: list[str], small: list[str] = SMALL
) -> list[exact.RankComparison]:
    """In a forked process: every pipeline stage, dry-run and computed."""
    from llada_megatron.dryrun.rank import run_rank

    config = dry_configuration(overrides, small)
    stage = rules.check(config).stages[stage_index]
    planner = Planner(config, expert_imbalance=1.0)
    placement, micro_batches = planner.place(config.layout), exact.dry_micro_batches(config, stage)
    reports = [
        asdict(run_rank(config, stage, rank, micro_batches))
        for rank in exact.one_rank_per_stage(config.layout)
    ]
    return [exact.compare(planner, placement, stage, report, micro_batches) for report in reports]


def all_comparisons(
    cases: dict[str, tuple[int, list[str]]], small: list[str] = SMALL
) -> dict[str, list[exact.RankComparison]]:
    return {name: comparisons(*case, small) for name, case in cases.items()}


def assert_same(one: exact.RankComparison, *, within: float = 0.05) -> None:
    held, report = one.parameters, one.report
    assert report["parameters"] == {
        "sharded": held.sharded,
        "replicated": held.replicated,
        "expert": held.expert,
        "bias": held.bias,
    }
    assert {part: size for part, size in report["static"].items() if part != "other"} == one.static
    assert report["kept"] == one.kept
    assert one.messages_found == one.messages
    activations = report["peak"] - one.static_found
    assert one.peak - one.static_found == pytest.approx(activations, rel=within)
