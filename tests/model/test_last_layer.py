"""The last layer without the clean rows that nobody reads: the same losses and gradients, and fewer rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from llada_megatron.config.compose import compose
from llada_megatron.config.schema import BlockGrid
from llada_megatron.data.packed import PackedSample
from llada_megatron.model.gpt import BlockDiffusionGPT
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.provider import build_stage
from llada_megatron.model.router import BalancedRouter
from llada_megatron.objectives.diffusion import diffusion_inputs
from llada_megatron.parallel import groups
from tests.distributed import run_ranks

L, MASK = 32, 257
NOISY = "model.expert_balance_clean_half=false"
DENSE = ["model.experts=0", "model.dense_layers=4"]
FULL, SELECTIVE = "layout.recompute=full", "layout.recompute=selective"


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    groups.initialize(compose(["experiment=parity"]).layout)
    yield
    groups.destroy()


def built(*overrides: str) -> BlockDiffusionGPT:
    """With weights so large that every row shows in every loss that depends on it."""
    return build_stage(compose(["experiment=parity", "model.init_std=0.1", *overrides]))


def packed_inputs() -> ModelInputs:
    draw = np.random.default_rng(0)
    samples = [
        PackedSample(draw.integers(0, MASK, L), np.array([0, cut, L]), document_ids=np.arange(2))
        for cut in (11, 20)
    ]
    return diffusion_inputs(
        samples,
        [draw.random(L) < 0.5 for _ in samples],
        block_size=4,
        grid=BlockGrid.sequence,
        mask_token_id=MASK,
    )


class Learnt(NamedTuple):
    """What a step would see of a micro-batch."""

    losses: torch.Tensor
    """[N]"""
    gradients: dict[str, torch.Tensor]
    """Of their mean, and of the router's own losses."""
    counts: list[torch.Tensor]
    """Tokens of each expert of each router that the balance counts."""


def learnt(stage: BlockDiffusionGPT, inputs: ModelInputs) -> Learnt:
    stage.zero_grad(set_to_none=True)
    routers = [part for part in stage.modules() if isinstance(part, BalancedRouter)]
    for router in routers:
        router.local_tokens_per_expert.zero_()
        router.sequence_weight = 1.0
    losses = stage(inputs)
    losses.mean().backward()
    gradients = {name: weight.grad for name, weight in stage.named_parameters()}
    return Learnt(losses.detach(), gradients, [each.local_tokens_per_expert.clone() for each in routers])


@contextmanager
def rows_seen(stage: BlockDiffusionGPT) -> Iterator[list[int]]:
    """Rows that each layer's feed-forward part and the final norm get."""
    seen: list[int] = []
    parts = [*(layer.mlp for layer in stage.decoder.layers), stage.decoder.final_layernorm]
    hooks = [part.register_forward_pre_hook(lambda _, given: seen.append(len(given[0]))) for part in parts]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("model", [DENSE, [NOISY, "model.router.sequence_balance=0.02"]], ids=str)
def test_losses_and_gradients_are_those_of_a_last_layer_on_all_rows(model: list[str]) -> None:
    stage = built(*model)
    inputs = packed_inputs()
    expected = learnt(stage, replace(inputs, noisy_outputs=False))
    with rows_seen(stage) as seen:
        ours = learnt(stage, inputs)
    assert seen == [2 * L] * (len(stage.decoder.layers) - 1) + [L, L]
    assert (ours.losses - expected.losses).abs().max() <= 2e-6 * expected.losses.abs().max()
    for name, gradient in expected.gradients.items():
        assert (ours.gradients[name] - gradient).norm() <= 2e-6 * gradient.norm(), name
    assert all(map(torch.equal, ours.counts, expected.counts))


def test_rows_that_a_balance_counts_reach_the_last_experts() -> None:
    stage = built()
    with rows_seen(stage) as seen:
        learnt(stage, packed_inputs())
    assert set(seen) == {2 * L}


@pytest.mark.parametrize(
    "recompute",
    [
        [*DENSE, FULL],
        pytest.param([*DENSE, SELECTIVE, "layout.recompute_modules=[core_attn,mlp]"], marks=pytest.mark.slow),
        pytest.param([NOISY, FULL], marks=pytest.mark.slow),
        pytest.param([NOISY, SELECTIVE, "layout.recompute_modules=[core_attn,moe]"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_recompute_changes_no_bit(recompute: list[str]) -> None:
    model = [each for each in recompute if each.startswith("model.")]
    inputs = packed_inputs()
    plain, again = (learnt(built(*each), inputs) for each in (model, recompute))
    assert torch.equal(plain.losses, again.losses)
    for name, gradient in plain.gradients.items():
        assert torch.equal(gradient, again.gradients[name]), name
    assert all(map(torch.equal, plain.counts, again.counts))


def exchanged(ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """In ranks of a tensor-parallel group: the noisy rows here, and a gradient that tells rows apart."""
    from llada_megatron.model.core_attention import _noisy_rows

    layout = compose(["experiment=parity", f"layout.processes={ranks}", f"layout.tp={ranks}"]).layout
    groups.initialize(layout)
    rank = torch.distributed.get_rank()
    rows = (torch.arange(4.0) + 4 * rank).view(4, 1, 1).requires_grad_()
    noisy = _noisy_rows(rows)
    (noisy**2).sum().backward()
    return noisy.detach().flatten().numpy(), rows.grad.flatten().numpy()


@pytest.mark.parametrize(
    "ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.full)]
)
def test_sequence_parallel_ranks_hand_each_other_the_noisy_rows_and_their_gradients(ranks: int) -> None:
    noisy, gradients = (
        np.concatenate(parts) for parts in zip(*run_ranks(exchanged, ranks, processes=ranks), strict=True)
    )
    row = np.arange(4.0 * ranks)
    assert (noisy == row[: 2 * ranks]).all()
    assert (gradients == np.where(row < 2 * ranks, 2 * row, 0)).all()
