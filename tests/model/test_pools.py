"""Block routing: pools against loops over blocks, and a router with pools against one without."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.config.families import formulas_of
from llada_megatron.config.schema import BlockGrid, Config, Recompute
from llada_megatron.model import pools
from llada_megatron.model.provider import build_stage
from llada_megatron.model.router import BalancedRouter
from llada_megatron.parallel import groups
from llada_megatron.verify import layouts
from llada_megatron.verify.comparison import Measurement, compare
from llada_megatron.verify.routing import RoutingMargin
from tests.distributed import run_ranks
from tests.model.test_provider import model_inputs, random_tokens

# isort: split
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

L, CAPACITY = 12, 6
CUTS = [torch.tensor([0, 7, 12]), torch.tensor([0, 12])]  # a document begins within a cell of the grid
CUT = BlockDiffusionMask(CUTS, 4)
MASKS = {
    "on the sequence's grid": CUT,
    "on the documents' grid": BlockDiffusionMask(CUTS, 4, block_grid=BlockGrid.document),
    "a block of one document": BlockDiffusionMask(CUTS, L, clean_copy=False),
    "causal": BlockDiffusionMask(CUTS, 1, clean_copy=False, causal=True),
}


@pytest.fixture(scope="module")
def config() -> Iterator[Config]:
    composed = compose(["experiment=parity", "model=tiny"])
    groups.initialize(composed.layout)
    yield composed
    groups.destroy()


def with_model(config: Config, **model: object) -> Config:
    return replace(config, model=replace(config.model, **model))


def tokens_of(config: Config, mask: BlockDiffusionMask) -> Tensor:
    return random_tokens(config, 2 * mask.total).view(2, -1)


def built(config: Config, *, bias: float = 0.3) -> torch.nn.Module:
    """A stage whose experts have unlike biases, and unlike scores."""
    stage = build_stage(config)
    for module in stage.modules():
        if isinstance(module, BalancedRouter):
            generator = torch.Generator().manual_seed(module.layer_number)
            module.expert_bias.copy_(bias * torch.randn(config.model.experts, generator=generator))
            module.weight.data *= 20
    return stage


def watched(stage: torch.nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Logits [S, B, E], weights and assignments [N, E] of the first router, for each forward."""
    router = next(module for module in stage.modules() if isinstance(module, BalancedRouter))
    seen = []
    router.register_forward_hook(
        lambda module, given, output: seen.append((module.gating(given[0]).detach(), *output))
    )
    return seen


def block_of(mask: BlockDiffusionMask, row: int, sample: int) -> tuple[int, ...]:
    """What names a row's block: its half, its document, its cell of the grid."""
    half, token = divmod(row, mask.length)
    document = int(mask.document_ids(sample)[token])
    origin = int(mask.cu_seqlens[sample][document]) if mask.block_grid == BlockGrid.document else 0
    return half, document, (token - origin) // mask.block_size


def by_loops(logits_SBE: Tensor, bias: Tensor, mask: BlockDiffusionMask, k: int) -> Tensor:
    """Weights [N, E] before the model's scaling, straight from the definition."""
    S, B, E = logits_SBE.shape
    scores = torch.sigmoid(logits_SBE.double())
    biased = scores + bias.double()
    weights = torch.zeros(S, B, E, dtype=torch.float64)
    for b in range(B):
        for block in {block_of(mask, s, b) for s in range(S)}:
            rows = [s for s in range(S) if block_of(mask, s, b) == block]
            best = [max(float(biased[s, b, j]) for s in rows) for j in range(E)]
            pool = sorted(range(E), key=lambda j: (-best[j], j))[:CAPACITY]
            for s in rows:
                chosen = sorted(pool, key=lambda j: -float(biased[s, b, j]))[:k]
                total = sum(float(scores[s, b, j]) for j in chosen)
                for j in chosen:
                    weights[s, b, j] = scores[s, b, j] / total
    return weights.view(S * B, E)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_row_chooses_the_best_of_its_blocks_pool(config: Config, mask: BlockDiffusionMask) -> None:
    pooled = with_model(config, expert_capacity=CAPACITY)
    stage = built(pooled)
    seen = watched(stage)
    stage(model_inputs(tokens_of(config, mask), mask))
    router = next(module for module in stage.modules() if isinstance(module, BalancedRouter))
    [(logits, weights, assigned)] = seen
    k, scaling = config.model.experts_per_token, config.model.routed_scaling_factor
    expected = scaling * by_loops(logits, router.expert_bias, mask, k)
    assert torch.equal(assigned, expected > 0)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(router.local_tokens_per_expert, assigned.sum(dim=0).float())  # after pooling


def test_of_equal_scores_the_lower_expert_is_in_the_pool() -> None:
    best = torch.tensor([[1.0, 3.0, 1.0, 1.0, 2.0], [0.5] * 5])
    assert pools.pools_of(best, 3).tolist() == [[True, True, False, False, True], [True] * 3 + [False] * 2]


def test_a_pool_of_all_experts_is_the_router_without_pools_and_groups(config: Config) -> None:
    def outcome(**model: object) -> list[Tensor]:
        stage = built(with_model(config, **model))
        loss = stage(model_inputs(tokens_of(config, CUT), CUT)).sum()
        loss.backward()
        counts = [m.local_tokens_per_expert for m in stage.modules() if isinstance(m, BalancedRouter)]
        gradients = [parameter.grad for parameter in stage.parameters() if parameter.grad is not None]
        return [loss.detach(), *counts, *gradients]

    plain = outcome(expert_groups=1, expert_groups_per_token=1)
    for found, expected in zip(outcome(expert_capacity=config.model.experts), plain, strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(outcome(expert_capacity=CAPACITY)[0], plain[0])


@pytest.mark.parametrize(
    ("recompute", "modules"), [(Recompute.full, []), (Recompute.selective, ["core_attn", "moe"])]
)
def test_recompute_keeps_the_blocks_of_each_micro_batch(
    config: Config, recompute: Recompute, modules: list[str]
) -> None:
    """Two micro-batches in flight whose blocks differ, as in a pipeline."""

    def gradients(**layout: object) -> list[Tensor]:
        stage = built(
            replace(
                with_model(config, expert_capacity=CAPACITY, expert_balance_clean_half=False),
                layout=replace(config.layout, **layout),
            )
        )
        outputs = [stage(model_inputs(tokens_of(config, mask), mask)).sum() for mask in MASKS.values()]
        for output in outputs:
            output.backward()
        counts = [m.local_tokens_per_expert for m in stage.modules() if isinstance(m, BalancedRouter)]
        return counts + [parameter.grad for parameter in stage.parameters() if parameter.grad is not None]

    plain = gradients()
    for found, expected in zip(
        gradients(recompute=recompute, recompute_modules=modules), plain, strict=True
    ):  # the sum of a row's weights is taken in another order without gradients
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_of_a_context_give_a_block_one_number(ranks: int) -> None:
    for mask in MASKS.values():
        whole, bits = pools.row_blocks(mask.whole())
        for rank in range(ranks):
            shard = ContextShard(mask, rank, ranks)
            here, bits_here = pools.row_blocks(shard.rectangle)
            assert bits_here == bits
            assert np.array_equal(here, np.take_along_axis(whole, shard.rows, axis=1))


def test_marks_bring_numbers_and_what_does_not_count_through_bools() -> None:
    blocks, bits = pools.row_blocks(CUT.whole())
    uncounted = torch.rand(2, 2 * L) < 0.5
    marks = pools.marks(torch.from_numpy(blocks), bits, uncounted)
    assert marks.dtype is torch.bool
    ignored, found, count = pools.read_marks(marks.transpose(0, 1))
    assert torch.equal(ignored, uncounted.T)
    assert len(set(found[0::2].tolist()) & set(found[1::2].tolist())) == 0  # of two samples
    assert torch.equal(found.view(-1, 2) % (count // 2), torch.from_numpy(blocks.T))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"expert_capacity": 3}, "model.expert_capacity=3 must be from the 4 experts of a token to all 16"),
        ({"expert_capacity": 17}, "model.expert_capacity=17 must be from the 4 experts"),
        ({"expert_capacity": 8, "expert_bias": False}, "needs model.expert_bias=true"),
    ],
)
def test_pools_that_cannot_be_are_refused(config: Config, settings: dict, sentence: str) -> None:
    model = with_model(config, **settings).model
    with pytest.raises(BadInput, match=sentence):
        formulas_of(model).check(model)


def test_layers_get_pools_with_the_models_setting(config: Config) -> None:
    stage = build_stage(with_model(config, expert_capacity=CAPACITY), initialize=False)
    layers = [module for module in stage.modules() if isinstance(module, MoELayer)]
    assert [layer.router.expert_capacity for layer in layers] == [CAPACITY] * len(layers)
    assert layers[0].config.moe_router_num_groups is None


def test_the_margin_of_a_routing_is_that_of_pools_and_in_them(config: Config) -> None:
    stage = built(with_model(config, expert_capacity=CAPACITY))
    router = next(module for module in stage.modules() if isinstance(module, BalancedRouter))
    margin, seen = RoutingMargin([router]), watched(stage)
    stage(model_inputs(tokens_of(config, CUT), CUT))
    logits_SBE = seen[0][0]
    gaps = []
    for b in range(2):
        blocks: dict[tuple[int, ...], list[Tensor]] = {}
        for s in range(2 * L):
            blocks.setdefault(block_of(CUT, s, b), []).append(logits_SBE[s, b].sigmoid() + router.expert_bias)
        for rows in blocks.values():
            order = torch.stack(rows).amax(dim=0).sort(descending=True)
            gaps.append(order.values[CAPACITY - 1] - order.values[CAPACITY])
            k = config.model.experts_per_token
            best = [row[order.indices[:CAPACITY]].sort(descending=True).values for row in rows]
            gaps += [each[k - 1] - each[k] for each in best]
    assert margin.smallest == pytest.approx(float(min(gaps)), rel=1e-4)


# Layouts, and mutations that break one rank's arithmetic as a plausible bug would.


@contextmanager
def no_mutation() -> Iterator[None]:
    yield


@contextmanager
def best_scores_of_the_rank() -> Iterator[None]:
    """Of a block that spans ranks each takes the best of its own rows."""
    alone = SimpleNamespace(all_reduce=lambda *args, **kwargs: None, ReduceOp=pools.dist.ReduceOp)
    with mock.patch.object(pools, "dist", alone):
        yield


@contextmanager
def clean_rows_counted_with_the_noisy_block() -> Iterator[None]:
    """On rank 1 the two halves have one pool."""
    numbers_of = pools.row_blocks

    def wrong(rectangle: object) -> tuple[np.ndarray, int]:
        rows, bits = numbers_of(rectangle)  # type: ignore[arg-type]
        if pools.dist.get_rank() and rectangle.mask.clean_copy:  # type: ignore[attr-defined]
            rows = np.tile(rows[:, : rows.shape[1] // 2], 2)
        return rows, bits

    with mock.patch.object(pools, "row_blocks", wrong):
        yield


MUTANTS = [
    (no_mutation, "TP2 EP2"),
    (no_mutation, "CP2"),
    (best_scores_of_the_rank, "TP2 EP2"),
    (best_scores_of_the_rank, "CP2"),
    (clean_rows_counted_with_the_noisy_block, "CP2"),
]


def measure_mutants(mutants: list, reference: Measurement) -> list[Measurement]:
    from llada_megatron.verify.measure import measure

    measured = []
    for mutation, config in mutants:
        with mutation():
            measured.append(measure(config, reference))
    return measured


@pytest.mark.full
def test_layouts_route_alike_and_the_comparison_fails_for_every_deliberate_error(tmp_path) -> None:
    """Two stages: blocks that lie on one context-parallel rank, and one that spans them."""
    stages = [f"{{name: b{size}, block_size: '{size}', tokens: 1024}}" for size in ("4", "full")]
    settings = [
        f"model.expert_capacity={CAPACITY}",
        f"schedule.stages=[{', '.join(stages)}]",
        "optimizer.warmup_tokens=512",
    ]
    corpus = layouts.write_corpus(tmp_path)
    [reference] = layouts.measure_in_processes([layouts.parity_config(corpus, *settings)], None)
    mutants = [
        (mutation, layouts.parity_config(corpus, *settings, **layouts.MATRIX[name]))
        for mutation, name in MUTANTS
    ]
    found = run_ranks(measure_mutants, mutants, reference, processes=2)[0]
    for (mutation, name), measured in zip(MUTANTS, found, strict=True):
        result = compare(name, 2, measured, reference)
        assert result.passed == (mutation is no_mutation), (mutation.__name__, result.differences)
