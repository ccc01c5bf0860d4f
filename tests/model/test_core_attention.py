"""What core attention asks its Keys, seen through a model that reads a sequence piece by piece."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.attention.keys import KeyRange, Keys
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


class Keeping(KeyRange):
    """Keeps what every layer saw."""

    def of(self, key, value, layer, group):
        found = super().of(key, value, layer, group)
        self.seen = getattr(self, "seen", {}) | {layer: found}
        return found


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
    kept: dict = {}
    for start in range(0, L, block_size):
        stop = min(start + block_size, L)
        keys = Keeping(causal(stop, block_size), start, kept)
        rows = stage(inputs(tokens[:, :stop], start, keys)).view(stop - start, B, -1)
        assert (rows - full[start:stop]).norm() <= SAME * full[start:stop].norm()
        kept = keys.seen
    assert sorted(kept) == list(range(1, config.model.layers + 1))


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
