"""Where the clean half ends with its keys in the last layer, and what that spares."""

from dataclasses import replace

import pytest

from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from llada_megatron.config.contents import Contents
from llada_megatron.config.flops import model_flops_per_token
from llada_megatron.config.last_layer import drops_clean_rows, last_rows_per_token
from llada_megatron.config.objectives import OBJECTIVES

NOISY = "model.expert_balance_clean_half=false"
DENSE = ["model.experts=0", "model.dense_layers=4"]
BF16, TE = "precision.dtype=bf16", "model.layer_spec=transformer_engine"


def drops(*overrides):
    config = compose(["experiment=parity", *overrides])
    rules.check(config)
    return drops_clean_rows(config, config.layout)


@pytest.mark.parametrize(
    "needed",
    [
        [],  # the balance counts the clean half
        [NOISY, "model.router.z_loss=0.01"],
        [NOISY, "model.router.rows_cap=2"],
        [NOISY, "model.expert_capacity=4"],
        [*DENSE, "layout.processes=2", "layout.pp=2", "layout.pipeline=[4,0]"],
        [*DENSE, TE, "training.cuda_graphs=[mlp]"],
        [*DENSE, TE, "layout.offload_modules=[core_attn]"],
        [*DENSE, TE, BF16, "precision.fp8=blockwise", "evaluation.infill_sequences=0"],
        [NOISY, BF16, "layout.processes=2", "layout.ep=2", "layout.dispatcher=deepep"],
    ],
    ids=" ".join,
)
def test_clean_rows_go_on_where_something_needs_them(needed):
    assert not drops(*needed)


@pytest.mark.parametrize(
    "free",
    [DENSE, [NOISY], [NOISY, "model.router.sequence_balance=0.02"], [*DENSE, "model.router.z_loss=0.01"]],
    ids=" ".join,
)
def test_they_end_where_nothing_does(free):
    assert drops(*free)


def test_a_stage_without_a_clean_half_has_one_row_per_token_everywhere():
    config = compose(["experiment=parity", *DENSE])
    stages = rules.schedule_of(config).stages
    assert [stage.clean_copy for stage in stages] == [True, True, False]
    assert [last_rows_per_token(config, config.layout, stage) for stage in stages] == [1, 1, 1]


def test_an_objective_that_supervises_clean_rows_needs_them(monkeypatch):
    config = compose(["experiment=parity", *DENSE])
    wider = replace(OBJECTIVES["diffusion"], supervises_clean_half=True)
    monkeypatch.setitem(OBJECTIVES, "diffusion", wider)
    stages = rules.schedule_of(config).stages
    assert [last_rows_per_token(config, config.layout, stage) for stage in stages] == [2, 2, 1]


def test_model_flops_leave_out_what_nobody_reads_whether_or_not_it_is_computed():
    config = compose(["experiment=parity", *DENSE])
    captured = compose(["experiment=parity", *DENSE, TE, "training.cuda_graphs=[mlp]"])
    balanced = compose(["experiment=parity", NOISY])
    counted = compose(["experiment=parity"])
    stage = rules.schedule_of(config).stages[0]
    assert model_flops_per_token(captured, stage) == model_flops_per_token(config, stage)
    spared = model_flops_per_token(counted, stage) - model_flops_per_token(balanced, stage)
    model = counted.model
    output = model.heads * model.head_dim * model.hidden_size
    experts = (
        3
        * model.hidden_size
        * (model.experts_per_token * model.expert_hidden_size + model.shared_expert_hidden_size)
    )
    assert spared == pytest.approx(6 * (output + experts + model.hidden_size * model.experts))


def test_a_last_stage_without_layers_has_no_last_layer():
    assert Contents(0, 0, first=False, last=True).before_last == (0, 0)
    assert Contents(0, 2, first=False, last=True).before_last == (0, 1)
    assert Contents(2, 0, first=False, last=True).before_last == (1, 0)
