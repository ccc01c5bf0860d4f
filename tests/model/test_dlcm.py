"""The family dlcm as a model: nothing of later tokens, other documents or other samples, in every form."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.config.compose import compose
from llada_megatron.config.families import dlcm
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.provider import build_stage
from llada_megatron.model.readout import LOGITS
from llada_megatron.objectives.concepts import BOUNDARIES, PARSED
from llada_megatron.parallel import groups

L = 48
SMALL = ["experiment=dlcm_parity", "model.init_std=0.3"]
DENSE = [
    *("model.dense_layers=4", "model.experts=0", "model.shared_expert_hidden_size=0"),
    *("model.expert_groups=1", "model.expert_groups_per_token=1", "model.experts_per_token=0"),
]
FORMS = [
    (
        f"model.concepts.concept={of}",
        f"model.concepts.attention={form}",
        f"model.concepts.boundary_grad={grad}",
    )
    for (of, form), grad in product(
        (("mean", "ragged"), ("mean", "replicated"), ("boundary_token", "ragged")), ("none", "ste")
    )
]


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    groups.initialize(LayoutConfig())
    yield
    groups.destroy()


def built(*overrides: str) -> torch.nn.Module:
    return build_stage(compose([*SMALL, "model.attention_backend=reference", *overrides]))


def given(tokens: torch.Tensor, edges: list[list[int]], draws: torch.Tensor | None = None) -> ModelInputs:
    B, S = tokens.shape
    mask = BlockDiffusionMask([torch.tensor(each) for each in edges], 1, clean_copy=False, causal=True)
    outputs = torch.arange(S * B)
    keys = ContextShard(mask)
    return ModelInputs(tokens, torch.arange(S)[None], keys, outputs, tokens.T.flatten(), LOGITS, draws=draws)


def drawn(B: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (B, L), generator=generator), torch.rand(B, L, generator=generator)


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
@torch.no_grad()
def test_a_token_changes_nothing_before_it_to_the_bit(form: tuple[str, ...]) -> None:
    model = built(*DENSE, *form)
    tokens, draws = drawn()
    for own_draws in (None, draws):
        before = model(given(tokens, [[0, 20, L]], own_draws))
        for t in (1, 7, 20, 33, L - 1):
            other = tokens.clone()
            other[0, t] = (other[0, t] + 1) % 256
            after = model(given(other, [[0, 20, L]], own_draws))
            assert torch.equal(after[:t], before[:t]) and not torch.equal(after[t], before[t])


@torch.no_grad()
def test_with_experts_a_token_changes_nothing_before_it() -> None:
    """Experts get rows in other numbers then, which may round otherwise."""
    model = built().double()
    tokens, draws = drawn()
    before = model(given(tokens, [[0, 20, L]], draws))
    for t in (7, 33):
        other = tokens.clone()
        other[0, t] = (other[0, t] + 1) % 256
        torch.testing.assert_close(model(given(other, [[0, 20, L]], draws))[:t], before[:t])


@pytest.mark.parametrize("form", [FORMS[0], FORMS[-1]], ids=" ".join)
@torch.no_grad()
def test_samples_and_documents_know_nothing_of_each_other(form: tuple[str, ...]) -> None:
    model = built(*form).double()
    tokens, draws = drawn(B=2)
    together = model(given(tokens, [[0, 20, L], [0, L]], draws)).view(L, 2, -1)
    for b, edges in enumerate([[0, 20, L], [0, L]]):
        alone = model(given(tokens[b : b + 1], [edges], draws[b : b + 1]))
        torch.testing.assert_close(together[:, b], alone)
    other = tokens.clone()
    other[0, :20] = 7
    torch.testing.assert_close(
        model(given(other, [[0, 20, L], [0, L]], draws)).view(L, 2, -1)[20:], together[20:]
    )


@torch.no_grad()
def test_boundaries_are_what_the_encoder_alone_says() -> None:
    model = built()
    tokens, draws = drawn(B=2)
    inputs = given(tokens, [[0, 20, L], [0, L]], draws)
    inputs.readout = BOUNDARIES
    sums = model(inputs)
    inputs.readout = PARSED
    parsed = model(inputs)
    assert len(parsed) == 2 * L + 4 and torch.equal(parsed[-4:], sums)
    assert (sums[:2] > 2).all() and (sums[:2] < L).all()


@pytest.mark.parametrize("grad", ["none", "ste"])
def test_next_tokens_reach_the_boundary_detector_only_straight_through(grad: str) -> None:
    model = built(f"model.concepts.boundary_grad={grad}")
    tokens, draws = drawn()
    model(given(tokens, [[0, L]], draws)).float().square().mean().backward()
    for projection in (model.boundary_q, model.boundary_k):
        gradient = projection.weight.grad
        assert (gradient is not None and bool(gradient.any())) == (grad == "ste")
    assert model.concept_attention.start.grad.any() and model.concept_proj.weight.grad.any()


@torch.no_grad()
def test_draws_decide_and_without_any_the_rule_does() -> None:
    """Draws of 0.5 take p >= 0.5, since sharpening keeps that order."""
    model = built()
    tokens, draws = drawn()
    by_rule = model(given(tokens, [[0, L]]))
    assert torch.equal(model(given(tokens, [[0, L]], torch.full((1, L), 0.5))), by_rule)
    assert not torch.equal(model(given(tokens, [[0, L]], draws)), by_rule)


@pytest.mark.parametrize("model", [[], DENSE, ["model.qk_norm=false", "model.qkv_bias=true"]], ids=str)
def test_parameters_are_counted_exactly(model: list[str]) -> None:
    config = compose([*SMALL, *model])
    stage = build_stage(config, initialize=False)
    contents = dlcm.stage_contents(config.model, config.layout)[0]
    counted = dlcm.parameters(config.model, contents)
    assert counted.trained == sum(parameter.numel() for parameter in stage.parameters())
    halves = dlcm.parameters(config.model, contents, tp=2, ep=2)
    assert halves.sharded * 2 == counted.sharded and halves.expert * 2 == counted.expert


def test_the_largest_published_model_has_the_published_size() -> None:
    model = compose(["experiment=dlcm_parity", "model=dlcm_2b"]).model
    total = dlcm.parameters(model, dlcm.stage_contents(model, LayoutConfig())[0]).trained
    assert total == 2_339_936_384  # 2.3 B
