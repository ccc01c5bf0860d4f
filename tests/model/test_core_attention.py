"""What core attention asks its Keys, seen through a model that reads a sequence piece by piece."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.attention.keys import KeyPool, Keys, PooledKeys
from llada_megatron.config.compose import compose
from llada_megatron.config.schema import Config
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.provider import build_model, build_stage
from llada_megatron.model.readout import LOGITS
from llada_megatron.parallel import groups

L, B = 24, 2
SAME = 1e-5
"""Products of other sizes add up in another order, and bold weights amplify it."""


@pytest.fixture(scope="module")
def config() -> Iterator[Config]:
    composed = compose(["experiment=parity", "model=tiny", "model.init_std=0.2"])
    groups.initialize(composed.layout)
    yield composed
    groups.destroy()


def causal(length: int, block_size: int) -> BlockDiffusionMask:
    ends = [torch.tensor([0, length])] * B
    return BlockDiffusionMask(ends, min(block_size, length), clean_copy=False, causal=True)


def inputs(tokens_BL: torch.Tensor, start: int, keys: Keys) -> ModelInputs:
    S = tokens_BL.shape[1] - start
    return ModelInputs(
        tokens=tokens_BL[:, start:],
        positions=torch.arange(start, start + S)[None],
        keys=keys,
        outputs=torch.arange(S * B),
        readout=LOGITS,
    )


@torch.no_grad()
@pytest.mark.parametrize("block_size", [1, 8, 10])
def test_blocks_read_one_after_another_with_kept_keys_equal_a_full_forward(
    config: Config, block_size: int
) -> None:
    stage = build_stage(config)
    tokens = torch.randint(400, (B, L), generator=torch.Generator().manual_seed(1))
    full = stage(inputs(tokens, 0, ContextShard(causal(L, block_size)))).view(L, B, -1)
    pool, places = KeyPool(B * L), [np.arange(L) + b * L for b in range(B)]
    starts = [*range(0, L, block_size)]
    for first, second in zip(starts, [0, *starts], strict=False):  # the second sequence is one block behind
        spans = [(start, min(start + block_size, L)) for start in (first, second)]
        keys = PooledKeys(pool, [(a, p[:z]) for (a, z), p in zip(spans, places, strict=True)], block_size)
        rows = stage(
            ModelInputs(
                tokens=torch.cat([tokens[b, a:z] for b, (a, z) in enumerate(spans)])[None],
                positions=torch.from_numpy(keys.positions)[None],
                keys=keys,
                outputs=torch.arange(len(keys.positions)),
                readout=LOGITS,
            )
        )
        expected = torch.cat([full[a:z, b] for b, (a, z) in enumerate(spans)])
        assert (rows - expected).norm() <= SAME * expected.norm()


@torch.no_grad()
def test_a_model_attends_with_the_executor_that_it_is_given(config: Config) -> None:
    calls = []

    def nothing(query, key, value, rectangle, scale):
        calls.append(scale)
        return torch.zeros(*query.shape[:3], value.shape[3])

    # A setting that no executor has: were it asked for, it would be refused.
    config = replace(config, model=replace(config.model, attention_backend="unknown"))
    (model,) = build_model(config, attention=nothing)
    tokens = torch.arange(B * L).view(B, L)
    rows = model(inputs(tokens, 0, ContextShard(causal(L, 4)))).view(L, B, -1)
    assert len(calls) == config.model.layers
    changed = tokens.clone()
    changed[:, 0] += 100
    again = model(inputs(changed, 0, ContextShard(causal(L, 4)))).view(L, B, -1)
    assert torch.equal(rows[1:], again[1:]) and not torch.equal(rows[0], again[0])
