"""The routers' own losses against loops over rows and experts, values and gradients."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from llada_megatron.config.choices import ExpertScore
from llada_megatron.config.compose import compose
from llada_megatron.config.router import RouterConfig
from llada_megatron.config.schema import Config
from llada_megatron.model.provider import build_stage
from llada_megatron.parallel import groups

# isort: split
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

S, B = 6, 3
SOFTMAX = dict(
    expert_score=ExpertScore.softmax, expert_bias=False, expert_groups=1, expert_groups_per_token=1
)
ROW_WEIGHT, SEQUENCE_WEIGHT = 0.7, 1.9


@pytest.fixture(scope="module")
def config() -> Iterator[Config]:
    composed = compose(["experiment=parity", "model=tiny"])
    groups.initialize(composed.layout)
    yield composed
    groups.destroy()


def by_loops(
    logits_SBE: Tensor, counted_SB: Tensor, k: int, losses: RouterConfig, softmax: bool = False
) -> Tensor:
    """z_loss summed over rows, sequence_balance over sequences, with the weights above; fp64."""
    _, _, E = logits_SBE.shape
    total = logits_SBE.new_zeros(())
    for b in range(B):
        rows = [logits_SBE[s, b] for s in range(S) if counted_SB[s, b]]
        f, P = [0.0] * E, [logits_SBE.new_zeros(())] * E
        for row in rows:
            scores = torch.exp(row) / (torch.exp(row).sum() if softmax else 1 + torch.exp(row))
            for i in range(E):
                P[i] = P[i] + scores[i] / scores.sum() / len(rows)
            for i in sorted(range(E), key=lambda i: -float(scores[i]))[:k]:
                f[i] += E / (k * len(rows))
        for i in range(E):
            total = total + losses.sequence_balance * SEQUENCE_WEIGHT * f[i] * P[i]
        for s in range(S):
            total = total + losses.z_loss * ROW_WEIGHT * torch.log(torch.exp(logits_SBE[s, b]).sum()) ** 2
    return total


LOSSES = {
    "z": RouterConfig(z_loss=0.3),
    "balance": RouterConfig(sequence_balance=0.2),
    "both": RouterConfig(z_loss=0.3, sequence_balance=0.2),
}


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "rows left out"])
@pytest.mark.parametrize("losses", LOSSES)
def test_gradients_are_those_of_the_equations(config: Config, losses: str, masked: bool) -> None:
    settings = LOSSES[losses]
    stage = build_stage(replace(config, model=replace(config.model, router=settings)))
    router = next(module for module in stage.modules() if isinstance(module, MoELayer)).router
    router.row_weight, router.sequence_weight = ROW_WEIGHT, SEQUENCE_WEIGHT
    router.expert_bias[:] = torch.arange(config.model.experts)  # no part of either loss
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(S, B, config.model.hidden_size, generator=generator, requires_grad=True)
    ignored_SB = torch.rand(S, B, generator=generator) < 0.4 if masked else None
    probs, _ = router(x, padding_mask=ignored_SB)
    (0 * probs.sum()).backward()

    plain_x, weight = x.detach().double().requires_grad_(), router.weight.detach().double().requires_grad_()
    counted_SB = torch.ones(S, B, dtype=torch.bool) if ignored_SB is None else ~ignored_SB
    by_loops(plain_x @ weight.T, counted_SB, config.model.experts_per_token, settings).backward()
    assert plain_x.grad.abs().max() > 1e-4
    torch.testing.assert_close(x.grad.double(), plain_x.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(router.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-7)


def test_a_softmax_router_is_balanced_by_its_softmaxes(config: Config) -> None:
    model = replace(config.model, router=LOSSES["balance"], **SOFTMAX)
    router = next(
        m for m in build_stage(replace(config, model=model)).modules() if isinstance(m, MoELayer)
    ).router
    router.sequence_weight = SEQUENCE_WEIGHT
    x = torch.randn(S, B, model.hidden_size, generator=torch.Generator().manual_seed(5), requires_grad=True)
    (0 * router(x)[0].sum()).backward()
    plain_x, weight = x.detach().double().requires_grad_(), router.weight.detach().double()
    everything = torch.ones(S, B, dtype=torch.bool)
    by_loops(plain_x @ weight.T, everything, model.experts_per_token, model.router, softmax=True).backward()
    assert plain_x.grad.abs().max() > 1e-4
    torch.testing.assert_close(x.grad.double(), plain_x.grad, rtol=1e-4, atol=1e-7)


def test_evaluation_and_a_router_without_losses_learn_nothing(config: Config) -> None:
    for settings, training in ((LOSSES["both"], False), (RouterConfig(), True)):
        stage = build_stage(replace(config, model=replace(config.model, router=settings)))
        router = next(module for module in stage.modules() if isinstance(module, MoELayer)).router
        router.row_weight, router.sequence_weight = ROW_WEIGHT, SEQUENCE_WEIGHT
        x = torch.randn(S, B, config.model.hidden_size, requires_grad=True)
        (0 * router.train(training)(x)[0].sum()).backward()
        assert (x.grad == 0).all()
