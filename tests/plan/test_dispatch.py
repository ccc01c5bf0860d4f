"""Bytes that `flex` dispatchers send, against simulated routing of single tokens."""

from dataclasses import replace

import numpy as np
import pytest

from llada_megatron.config.schema import Dispatcher, LayoutConfig, ModelConfig
from llada_megatron.plan.dispatch import PER_COPY, flex_bytes, reached
from llada_megatron.plan.traffic import layer_messages
from tests.plan.flash import balanced_shape, model_of

TOKENS = 20_000


def experts_of_tokens(model: ModelConfig, generator: np.random.Generator) -> np.ndarray:
    """[TOKENS, k]: groups evenly, then experts evenly among those of the groups."""
    groups = 1 if model.expert_capacity else model.expert_groups
    chosen = min(groups, model.expert_groups_per_token)
    group = model.experts // groups
    of_groups = np.argsort(generator.random((TOKENS, groups)), axis=1)[:, :chosen]
    open_experts = (of_groups[:, :, None] * group + np.arange(group)).reshape(TOKENS, -1)
    best = np.argsort(generator.random(open_experts.shape), axis=1)[:, : model.experts_per_token]
    return np.take_along_axis(open_experts, best, axis=1)


@pytest.mark.parametrize("pools", [0, 48], ids=["groups", "pools"])
@pytest.mark.parametrize("ways", [2, 8, 32])
def test_a_token_reaches_as_many_processes_as_in_simulated_routing(ways: int, pools: int) -> None:
    model = replace(model_of("flash"), expert_capacity=pools)
    chosen = experts_of_tokens(model, np.random.default_rng(ways))
    owners = np.sort(chosen // (model.experts // ways), axis=1)
    distinct = 1 + (np.diff(owners, axis=1) > 0).sum(axis=1)
    assert ways * reached(model, model.experts // ways) == pytest.approx(distinct.mean(), rel=0.01)


def test_tokens_cross_the_network_once_to_a_node_and_links_once_to_a_process() -> None:
    model, layout = model_of("flash"), LayoutConfig(processes=32, ep=16, dispatcher=Dispatcher.deepep)
    shape = replace(balanced_shape(tp=1, cp=1, rows=4096), experts_on_node=8)
    inside, outside = flex_bytes(model, shape, layout, b=2)
    chosen = experts_of_tokens(model, np.random.default_rng(0))
    owners = np.sort(chosen // 16, axis=1)
    processes = 1 + (np.diff(owners, axis=1) > 0).sum(axis=1).mean()
    elsewhere = (owners >= 8).any(axis=1).mean()  # of a token of the first node
    token = 2 * model.hidden_size + PER_COPY * model.experts_per_token
    assert outside == pytest.approx(shape.tokens * elsewhere * token, rel=0.01)
    assert inside == pytest.approx(shape.tokens * processes * 7 / 8 * token, rel=0.01)


def test_a_flex_dispatcher_sends_less_than_copies_and_four_times_a_layer() -> None:
    model, layout = model_of("flash"), LayoutConfig(processes=32, ep=16)
    shape = replace(balanced_shape(tp=1, cp=1, rows=4096), experts_on_node=8)
    copies, _, flex = (
        [m for m in layer_messages(model, shape, replace(layout, dispatcher=name), moe=True, b=2)]
        for name in (Dispatcher.alltoall, Dispatcher.allgather, Dispatcher.hybridep)
    )
    (exchange,) = flex
    assert exchange.forward + exchange.backward == 4 and exchange.module == "moe"
    assert exchange.payload + exchange.network < max(message.payload for message in copies)
