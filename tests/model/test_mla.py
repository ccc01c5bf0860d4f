"""Latent attention: its parameters, its absorbed form, and what cannot be built."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.attention.keys import KeyPool, PooledKeys, PoolPart
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.config.families.gpt import check
from llada_megatron.config.parameters import cached_token_bytes, total_parameters
from llada_megatron.config.rules import check as check_rules
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.generate import Decoder, Limits
from llada_megatron.generate.rules import rule_of
from llada_megatron.model.core_attention import BlockDiffusionCoreAttention
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.provider import build_model
from llada_megatron.model.readout import LOGITS
from llada_megatron.parallel import groups
from tests.generate.models import CONTEXT, MASK, prompt_of, settings, tiny, uncached
from tests.model.latents import FULL_QUERIES, MLA


@pytest.fixture(scope="module", autouse=True)
def one_process():
    groups.initialize(LayoutConfig())
    yield
    groups.destroy()


@pytest.mark.parametrize("overrides", [MLA, (*MLA, FULL_QUERIES)], ids=["latent queries", "full queries"])
def test_a_model_has_the_parameters_that_are_counted(overrides) -> None:
    config = compose(["experiment=parity", *overrides])
    (stage,) = build_model(config, initialize=False)
    biases = sum(b.numel() for name, b in stage.named_buffers() if name.endswith("expert_bias"))
    assert sum(p.numel() for p in stage.parameters()) + biases == total_parameters(config.model)


def losses_and_gradients(*overrides: str) -> tuple[list[torch.Tensor], int]:
    """And the bytes of the queries that wait for backward."""
    S, queries = 12, []
    (stage,) = build_model(compose(["experiment=parity", "model=tiny", *MLA, *overrides]))
    for module in stage.modules():
        if isinstance(module, BlockDiffusionCoreAttention):
            module.register_forward_pre_hook(lambda _, given: queries.append(given[0]))
    mask, rows = BlockDiffusionMask([torch.tensor([0, 7, S])], 4), torch.arange(S)
    tokens = torch.randint(256, (1, 2 * S), generator=torch.Generator().manual_seed(0))
    losses = stage(ModelInputs(tokens, rows.repeat(2)[None], ContextShard(mask), rows, labels=rows))
    waiting = sum(query.untyped_storage().nbytes() for query in queries)
    losses.sum().backward()
    return [losses.detach(), *(p.grad for p in stage.parameters() if p.grad is not None)], waiting


@pytest.mark.parametrize(
    "model, modules",
    [
        ((), "mla_up_proj"),
        pytest.param((FULL_QUERIES,), "mla_up_proj", marks=pytest.mark.slow),
        pytest.param((), "core_attn,mla_up_proj", marks=pytest.mark.slow),
        pytest.param(("model.core=hybrid",), "mla_up_proj", marks=pytest.mark.slow),
    ],
)
def test_heads_that_are_made_again_change_no_loss_and_no_gradient(model, modules) -> None:
    plain, waiting = losses_and_gradients(*model)
    recompute = "layout.recompute=selective", f"layout.recompute_modules=[{modules}]"
    again, waiting_then = losses_and_gradients(*model, *recompute)
    assert waiting > 0 == waiting_then
    assert len(plain) == len(again) and all(map(torch.equal, plain, again))


@torch.no_grad()
def test_attention_over_kept_latents_gives_the_logits_of_that_over_keys_of_heads() -> None:
    """Block after block, as decoding reads them, against one forward over the whole sequence."""
    S, block = 16, 4
    model = tiny(settings(*MLA)).double()
    tokens, rows = torch.from_numpy(prompt_of(S))[None], torch.arange(S)

    def logits(keys, first, stop):
        positions = rows[first:stop]
        given = tokens[:, first:stop], positions[None], keys, torch.arange(stop - first)
        return model(ModelInputs(*given, readout=LOGITS))

    mask = BlockDiffusionMask([torch.tensor([0, S])], block, clean_copy=False, causal=True)
    expected_SV = logits(ContextShard(mask), 0, S)
    pool = KeyPool(S)
    for first in range(0, S, block):
        keys = PooledKeys(pool, [(first, np.arange(first + block))], block)
        found = logits(keys, first, first + block)
        torch.testing.assert_close(found, expected_SV[first : first + block], rtol=1e-5, atol=1e-5)
    assert pool.bytes == 8 * S * model.config.num_layers * (16 + 8)  # no value of its own


class OfHeads:
    """Pooled keys that latent attention does not take for such: it keeps keys and values of all heads."""

    def __init__(self, keys: PooledKeys) -> None:
        self.keys, self.mask, self.rectangle, self.of = keys, keys.mask, keys.rectangle, keys.of


@torch.no_grad()
def test_latents_of_several_sequences_with_a_shadow_give_the_logits_of_keys_of_heads() -> None:
    model, block, rng = tiny(settings(*MLA)).double(), 4, np.random.default_rng(0)
    places = rng.permutation(40)
    first, second, shadow = places[:12], places[12:21], places[21:25]
    forwards = [
        [PoolPart(slice(0, 8), first[:8]), PoolPart(slice(0, 4), second[:4])],
        [PoolPart(8, first), PoolPart(slice(8, 12), first, shadow), PoolPart(4, second)],
    ]
    pools = KeyPool(40), KeyPool(40)
    for parts in forwards:
        latents, heads = (PooledKeys(pool, parts, block) for pool in pools)
        S = len(latents.positions)
        given = torch.from_numpy(rng.integers(480, size=(1, S))), torch.from_numpy(latents.positions)[None]
        found, expected = (
            model(ModelInputs(*given, keys, torch.arange(S), readout=LOGITS))
            for keys in (latents, OfHeads(heads))
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert pools[0].bytes * 4 * (24 + 20) == pools[1].bytes * (16 + 8)


@pytest.mark.parametrize(
    "recompute",
    [(), ("layout.recompute=selective", "layout.recompute_modules=[mla_up_proj]")],
    ids=["", "a model that trains with recompute"],
)
def test_decoding_keeps_the_bytes_that_are_known_and_gives_the_tokens_of_the_loop_without_a_cache(
    recompute,
) -> None:
    config, rule = settings(*MLA, *recompute), rule_of("threshold", {"threshold": 0.05})
    model = tiny(config)
    ours = Decoder(
        model, rule=rule, block_size=4, mask_token_id=MASK, context=CONTEXT, batch=2, max_cached_tokens=64
    )
    prompts = [prompt_of(13), prompt_of(8), np.append(prompt_of(13)[:12], prompt_of(3))]
    for prompt, result in zip(prompts, ours.results(prompts, Limits(new_tokens=10)), strict=True):
        np.testing.assert_array_equal(result.tokens, uncached(model, prompt, 10, 4, rule)[0])
    assert ours.counts.shared_tokens
    assert ours.cache_bytes == (64 + 1) * cached_token_bytes(config.model, config.precision, config.layout)


WRONG = [
    (["model.kv_heads=2"], "model.kv_heads=2 must be 4 with model.mla"),
    (["model.head_dim=32"], "model.head_dim=32 must be 24 with model.mla"),
    (["model.rotary_fraction=0.5"], "model.rotary_fraction=0.5 must be 1.0 with model.mla"),
    (["model.qk_norm=false"], "model.qk_norm=false must be true with model.mla"),
    (["model.mla.qk_rope_head_dim=7"], "model.mla.qk_rope_head_dim=7 must be an even number"),
    (["model.mla.v_head_dim=0"], "model.mla.v_head_dim is 0"),
    (["model.mla.kv_lora_rank=0"], "means nothing with model.mla.kv_lora_rank=0"),
    (["model.rotary_scaling.type=linear"], "mscale_all_dim=1.0 belongs to type=yarn, not linear"),
    (["model.lora.rank=4"], "model.lora.targets has attention"),
]


@pytest.mark.parametrize("overrides, sentence", WRONG)
def test_what_cannot_be_built_is_a_sentence(overrides, sentence) -> None:
    with pytest.raises(BadInput, match=re.escape(sentence)):
        check(compose(["experiment=parity", *MLA, *overrides]).model)


def test_latents_that_tensor_parallelism_cannot_split_are_a_sentence() -> None:
    layout = ["layout.processes=2", "layout.tp=2", "model.mla.q_lora_rank=25"]
    with pytest.raises(BadInput, match=r"layout.tp=2 does not divide model.mla.q_lora_rank=25"):
        check_rules(compose(["experiment=parity", *MLA, *layout]))
    with pytest.raises(BadInput, match=r"changes softmax's scale of model.mla alone"):
        check(compose(["experiment=parity", "model.rotary_scaling.mscale_all_dim=1"]).model)
