"""What the router counts for the balance of the experts."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.config.choices import ExpertScore
from llada_megatron.config.compose import compose
from llada_megatron.config.router import RouterConfig
from llada_megatron.config.schema import Config, Recompute
from llada_megatron.model.provider import build_model, build_stage
from llada_megatron.model.router import BalancedRouter, within_cap
from llada_megatron.parallel import groups
from tests.model.test_provider import model_inputs, random_tokens

# isort: split
from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias
from megatron.core.transformer.moe.moe_layer import MoELayer

S, B = 7, 2


@pytest.fixture(scope="module")
def config() -> Iterator[Config]:
    composed = compose(["experiment=parity", "model=tiny"])
    groups.initialize(composed.layout)
    yield composed
    groups.destroy()


@pytest.fixture
def layer(config: Config) -> MoELayer:
    return next(module for module in build_stage(config).modules() if isinstance(module, MoELayer))


def hidden(config: Config) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(S, B, config.model.hidden_size, generator=generator, requires_grad=True)


def routers(stage: torch.nn.Module) -> list[BalancedRouter]:
    return [module for module in stage.modules() if isinstance(module, BalancedRouter)]


def counts(stage: torch.nn.Module) -> list[list[float]]:
    return [router.local_tokens_per_expert.tolist() for router in routers(stage)]


def test_every_layer_with_experts_has_the_router(config: Config) -> None:
    stage = build_stage(config, initialize=False)
    assert len(routers(stage)) == config.model.layers - config.model.dense_layers


def test_only_tokens_that_count_are_counted_and_each_is_routed_as_without_a_mask(
    config: Config, layer: MoELayer
) -> None:
    x = hidden(config)
    ignored_BS = torch.rand(B, S, generator=torch.Generator().manual_seed(1)) < 0.5
    with torch.no_grad():
        routing_map = layer.router(x)[1].view(S, B, -1)
        output = layer(x)[0]
    masked = layer(x, padding_mask=ignored_BS)[0]
    counted = routing_map[~ignored_BS.T].sum(dim=0)
    assert 0 < counted.sum() < routing_map.sum()
    assert layer.router.local_tokens_per_expert.tolist() == counted.tolist()
    assert torch.equal(masked, output)


def test_counts_add_up_over_micro_batches_and_a_pass_without_gradients_adds_nothing(
    config: Config, layer: MoELayer
) -> None:
    x = hidden(config)
    layer(x)
    once = layer.router.local_tokens_per_expert.clone()
    assert once.sum() == S * B * config.model.experts_per_token
    with torch.no_grad():
        layer(x)
    assert torch.equal(layer.router.local_tokens_per_expert, once)
    layer(x)
    assert torch.equal(layer.router.local_tokens_per_expert, 2 * once)


@pytest.mark.parametrize(
    ("recompute", "modules"), [(Recompute.full, []), (Recompute.selective, ["core_attn", "moe"])]
)
def test_recompute_counts_every_token_once(config: Config, recompute: Recompute, modules: list[str]) -> None:
    def counted(**layout: object) -> list[list[float]]:
        stage = build_stage(replace(config, layout=replace(config.layout, **layout)))
        mask = BlockDiffusionMask([torch.tensor([0, 16])], 4)
        stage(model_inputs(random_tokens(config, 32)[None], mask)).sum().backward()
        return counts(stage)

    expected = counted()
    assert sum(expected[0]) == 32 * config.model.experts_per_token
    assert counted(recompute=recompute, recompute_modules=modules) == expected


def test_groups_that_are_nodes_bound_the_nodes_of_a_token(config: Config, layer: MoELayer) -> None:
    """Experts lie on ranks in order, so that a group per node is DeepSeek-V3's node-limited routing."""
    model, generator = config.model, torch.Generator().manual_seed(0)
    layer.router.expert_bias.copy_(0.01 * torch.randn(model.experts, generator=generator))
    _, chosen_TE = layer.router(torch.randn(64, 1, model.hidden_size, generator=generator))
    on_nodes = chosen_TE.view(64, model.expert_groups, -1).any(-1)
    assert (chosen_TE.sum(1) == model.experts_per_token).all()
    assert (on_nodes.sum(1) <= model.expert_groups_per_token).all() and on_nodes.any(0).all()


@pytest.mark.parametrize("normalized", [True, False])
def test_a_softmax_router_weighs_as_published_and_counts_without_a_bias(
    config: Config, normalized: bool
) -> None:
    model = replace(
        config.model,
        **dict(expert_score=ExpertScore.softmax, normalize_expert_weights=normalized, expert_bias=False),
        **dict(expert_groups=1, expert_groups_per_token=1),
    )
    layer = next(m for m in build_stage(replace(config, model=model)).modules() if isinstance(m, MoELayer))
    x, k = hidden(config), model.experts_per_token
    weight_NE, map_NE = layer.router(x)
    share_NE = (x.flatten(0, 1) @ layer.router.weight.T).softmax(-1)
    best_Nk = share_NE.topk(k, dim=-1)
    divided_by_N1 = best_Nk.values.sum(-1, keepdim=True) if normalized else 1
    expected_Nk = model.routed_scaling_factor * best_Nk.values / divided_by_N1
    assert map_NE.sum(dim=1).tolist() == [k] * len(map_NE)
    torch.testing.assert_close(weight_NE.gather(1, best_Nk.indices), expected_Nk)
    assert layer.router.expert_bias is None
    assert layer.router.local_tokens_per_expert.tolist() == map_NE.sum(dim=0).tolist()


def test_a_softmax_over_all_experts_is_limited_to_the_groups_of_largest_shares(config: Config) -> None:
    choice = dict(expert_score=ExpertScore.softmax, normalize_expert_weights=False, expert_bias=False)
    model = replace(config.model, **choice, expert_groups=4, expert_groups_per_token=2)
    layer = next(m for m in build_stage(replace(config, model=model)).modules() if isinstance(m, MoELayer))
    x, k = hidden(config), model.experts_per_token
    weight_NE, map_NE = layer.router(x)
    share_NE = (x.flatten(0, 1) @ layer.router.weight.T).softmax(-1)
    best_NG = share_NE.unflatten(1, (4, -1)).topk(k // 2).values.sum(-1)
    open_NG = torch.zeros_like(best_NG).scatter(1, best_NG.topk(2).indices, 1)
    open_NE = open_NG.repeat_interleave(model.experts // 4, dim=1)
    chosen_Nk = (share_NE * open_NE).topk(k).indices
    assert torch.equal(map_NE, torch.zeros_like(map_NE).scatter(1, chosen_Nk, True))
    torch.testing.assert_close(weight_NE, model.routed_scaling_factor * share_NE * map_NE)


def test_counts_stay_exact_in_a_bf16_model(config: Config) -> None:
    L = 1003  # in bf16 it is 1004
    bf16 = replace(config, precision=replace(config.precision, dtype="bf16"))
    (model,) = build_model(bf16)
    tokens = random_tokens(config, L).fill_(7)[None]  # one token over and over chooses the same experts
    model(model_inputs(tokens, BlockDiffusionMask([torch.tensor([0, L])], L, clean_copy=False)))
    for router in routers(model):
        assert sum(router.local_tokens_per_expert.tolist()) == L * config.model.experts_per_token
        assert router.expert_bias.dtype is torch.float32


def test_megatron_cores_own_update_leaves_the_bias_alone(config: Config, layer: MoELayer) -> None:
    layer(hidden(config))
    layer.config.moe_router_bias_update_rate = 1.0
    _update_router_expert_bias([layer], layer.config)
    assert (layer.router.expert_bias == 0).all()


def test_the_cap_keeps_the_heaviest_assignments_of_each_rank_and_of_equal_ones_the_first() -> None:
    N, E, k, ranks, most = 24, 8, 3, 2, 20
    generator = torch.Generator().manual_seed(3)
    scores_NE = torch.randint(1, 6, (N, E), generator=generator).float()  # many are equal
    chosen_Nk = (scores_NE + torch.tensor([9.0] * 4 + [0.0] * 4)).topk(k).indices  # most of them of rank 0
    chosen_Nk[::4, 0] = 7
    map_NE = torch.zeros(N, E, dtype=torch.bool).scatter_(1, chosen_Nk, True)
    kept_NE = within_cap(scores_NE * map_NE, map_NE, ranks, most) & map_NE
    for rank, experts in enumerate((range(4), range(4, 8))):
        wanted = [(-float(scores_NE[n, e]), n, e) for n in range(N) for e in experts if map_NE[n, e]]
        assert (len(wanted) > most) == (rank == 0)
        kept = {(n, e) for n in range(N) for e in experts if kept_NE[n, e]}
        assert kept == {(n, e) for _, n, e in sorted(wanted)[:most]}


def test_evaluation_drops_nothing(config: Config) -> None:
    capped = replace(config.model, router=RouterConfig(rows_cap=1.0))
    layer = next(
        module
        for module in build_stage(replace(config, model=capped)).modules()
        if isinstance(module, MoELayer)
    )
    layer.config.expert_model_parallel_size = 2  # as if another rank had half of the experts
    x = hidden(config)
    per_row = [config.model.experts_per_token] * (S * B)
    assert layer.router(x)[1].sum(dim=1).tolist() != per_row
    assert layer.eval().router(x)[1].sum(dim=1).tolist() == per_row
