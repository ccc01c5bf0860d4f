"""layout.overlap_experts: two micro-batches at a time train what one after the other do, bit for bit."""

from unittest import mock

import pytest

from llada_megatron.config.layout import data_parallel_size
from tests.distributed import run_ranks
from tests.model.latents import MLA
from tests.training.runs import TWO, comparable, configure, train, train_rank

FOUR = "layout.processes=4"
EP2 = ["precision=bf16", "layout.ep=2", "layout.global_batch=8"]
OVERLAPPED = "layout.overlap_experts=true"


def plans_and_outcomes(config):
    """How many schedule plans were made, and what a run came to."""
    from llada_megatron.model.gpt import BlockDiffusionGPT

    built = BlockDiffusionGPT.build_schedule_plan
    with mock.patch.object(
        BlockDiffusionGPT, "build_schedule_plan", autospec=True, side_effect=built
    ) as seen:
        return train_rank([config]), seen.call_count


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        [TWO, "layout.cp=2"],
        [FOUR, "layout.pp=2", "layout.vpp=2"],
        pytest.param([TWO], marks=pytest.mark.full),
        pytest.param(
            [TWO, "layout.recompute=selective", "layout.recompute_modules=[core_attn]"],
            marks=pytest.mark.full,
        ),
        pytest.param(
            [TWO, "layout.overlap_grad_reduce=true", "layout.overlap_param_gather=true"],
            marks=pytest.mark.full,
        ),
        pytest.param([FOUR, "layout.tp=2", "layout.etp=2"], marks=pytest.mark.full),
        pytest.param([TWO, *MLA], marks=pytest.mark.full),
    ],
    ids=" ".join,
)
def test_it_computes_what_one_micro_batch_after_the_other_does(corpus, tmp_path, layout):
    train(configure(corpus, tmp_path / "straight", *EP2, *layout))
    overlapped = configure(corpus, tmp_path / "overlapped", *EP2, *layout, OVERLAPPED)
    ranks = run_ranks(plans_and_outcomes, overlapped, processes=overlapped.layout.processes)
    steps = len(comparable(tmp_path / "overlapped"))
    forwards = steps * 8 // data_parallel_size(overlapped.layout) * overlapped.layout.vpp
    assert {count for _, count in ranks} == {forwards}
    assert comparable(tmp_path / "overlapped") == comparable(tmp_path / "straight")
