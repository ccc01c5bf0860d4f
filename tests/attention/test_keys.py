"""Rows against kept keys are the same rows of a full forward; values may be narrower or wider than keys."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask, block_diffusion_attention, select_backend, varlen
from llada_megatron.attention.keys import KeyPool, PooledKeys, PoolPart
from llada_megatron.config.errors import BadInput
from llada_megatron.model.pools import row_blocks
from tests.attention.dense_varlen import dense_varlen

L = 24
EXECUTORS = ("reference", "portable")


def tensors(mask: BlockDiffusionMask, value_dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(mask.block_size)
    sizes = (4, 8), (2, 8), (2, value_dim)
    return [torch.randn(mask.total, mask.batch, *s, generator=generator, dtype=torch.float64) for s in sizes]


PARTS = {
    "one": [(16, 24)],
    "one from its first token": [(0, 24)],
    "blocks at several steps": [(16, 24), (0, 8), (8, 16)],
    "a long prompt beside a short last block": [(0, 240), (16, 19), (40, 56)],
}
"""By name: of each sequence the tokens that are kept, and its length."""


@pytest.mark.parametrize("backend", EXECUTORS)
@pytest.mark.parametrize("parts", list(PARTS))
@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_rows_with_kept_keys_equal_those_of_each_sequence_alone(
    block_size: int, parts: str, backend: str
) -> None:
    pool, rows, expected = KeyPool(400), [], []
    places = np.random.default_rng(3).permutation(400) if len(PARTS[parts]) > 1 else np.arange(7, 400)
    asked, at = [], 0
    for kept, length in PARTS[parts]:
        mask = BlockDiffusionMask(
            [torch.tensor([0, length])], min(block_size, length), clean_copy=False, causal=True
        )
        query, key, value = tensors(mask, value_dim=6)
        expected.append(block_diffusion_attention(query, key, value, mask, "reference")[kept:])
        own = places[at : at + length]
        for layer in (1, 2):
            for pooled, seen in zip(pool.of_layer(layer, key, value), (key, value), strict=True):
                pooled[torch.from_numpy(own[:kept])] = layer * seen[:kept, 0]
        rows.append([tensor[kept:] for tensor in (query, key, value)])
        asked.append((kept, own))
        at += length
    keys = PooledKeys(pool, asked, block_size).to(torch.device("cpu"))
    assert keys.positions.tolist() == [p for kept, length in PARTS[parts] for p in range(kept, length)]
    query, key, value = (torch.cat(tensors) for tensors in zip(*rows, strict=True))
    found = block_diffusion_attention(query, *keys.of(key, value, 1, None), keys.rectangle, backend)
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-12, rtol=0)
    if asked[0][0]:
        assert torch.equal(keys.of(key, value, 2, None)[0][0], 2 * keys.of(key, value, 1, None)[0][0])
    # What was written stays: the rows of a next forward find it.
    assert torch.equal(pool.of_layer(1, key, value)[0][torch.from_numpy(asked[0][1])[-1]], rows[0][1][-1, 0])


SLICES = {
    "all": [slice(0, 24)],
    "a few within": [slice(8, 16)],
    "several": [slice(8, 16), slice(0, 8), slice(3, 19), slice(16, 20)],
    "long ones": [slice(100, 132), slice(0, 70), slice(60, 64)],
}


@pytest.mark.parametrize("backend", [*EXECUTORS, partial(varlen.varlen_attention, kernel=dense_varlen)])
@pytest.mark.parametrize("rows", list(SLICES))
def test_rows_of_full_attention_see_every_key_of_their_sequence_and_of_no_other(rows, backend) -> None:
    pool, of_rows, expected, asked, at = KeyPool(500), [], [], [], 0
    places = np.random.default_rng(3).permutation(500) if len(SLICES[rows]) > 1 else np.arange(7, 500)
    for part in SLICES[rows]:
        length = part.stop + 11
        mask = BlockDiffusionMask([torch.tensor([0, length])], length, clean_copy=False)
        query, key, value = tensors(mask, value_dim=8)
        expected.append(block_diffusion_attention(query, key, value, mask, "reference")[part])
        own = places[at : at + length]
        for pooled, seen in zip(pool.of_layer(1, key, value), (key, value), strict=True):
            pooled[torch.from_numpy(own)] = seen[:, 0]
            pooled[torch.from_numpy(own[part])] = 100.0  # of another forward: the rows bring their own
        of_rows.append([tensor[part] for tensor in (query, key, value)])
        asked.append((part, own))
        at += length
    keys = PooledKeys(pool, asked, 200)
    assert keys.positions.tolist() == [at for part in SLICES[rows] for at in range(part.start, part.stop)]
    query, key, value = (torch.cat(tensors) for tensors in zip(*of_rows, strict=True))
    found = block_diffusion_attention(query, *keys.of(key, value, 1, None), keys.rectangle, backend)
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-12, rtol=0)


@pytest.mark.parametrize("value_dim", [3, 8, 12])
@pytest.mark.parametrize("backend", EXECUTORS)
@pytest.mark.parametrize("clean_copy", [True, False])
def test_values_of_another_width_equal_dense_attention_in_output_and_gradients(
    backend: str, value_dim: int, clean_copy: bool
) -> None:
    cu_seqlens = [torch.tensor([0, 9, L]), torch.tensor([0, L])]
    mask = BlockDiffusionMask(cu_seqlens, 4, clean_copy=clean_copy, causal=not clean_copy)
    inputs = [tensor.requires_grad_() for tensor in tensors(mask, value_dim)]
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in inputs)  # [B, heads, S, width]
    visible = torch.stack([mask.dense(sample) for sample in range(mask.batch)])[:, None]
    # Every product written out: the fused ones are what is tested, and know one width.
    scores = query @ key.repeat_interleave(2, dim=1).mT * 8**-0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    expected = (weights @ value.repeat_interleave(2, dim=1)).permute(2, 0, 1, 3)
    ours = block_diffusion_attention(*inputs, mask, backend)
    assert ours.shape == (mask.total, mask.batch, 4, value_dim)
    slope = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(result, inputs, slope) for result in (ours, expected))
    for a, b in zip((ours, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["cudnn_graph", "cudnn_flex", "varlen"])
def test_an_executor_of_one_width_says_so(name: str) -> None:
    with pytest.raises(BadInput, match=f"{name} serves values as wide as keys, not 64 wide for keys of 96"):
        select_backend(name, torch.device("cuda"), torch.bfloat16, 96, True, 64)
    decoding = name == "varlen"
    _, line = select_backend("auto", torch.device("cuda"), torch.bfloat16, 96, not decoding, 64, decoding)
    assert line.startswith("portable" if decoding else "flex_torch")
    assert name in line or name == "cudnn_graph"  # which comes behind flex_torch


def test_an_executor_can_be_handed_in() -> None:
    mask = BlockDiffusionMask([torch.tensor([0, L])], 4)
    inputs = tensors(mask, value_dim=6)

    def attend(query, key, value, rectangle, scale):
        assert rectangle.mask is mask and scale == 8**-0.5  # of the key's width
        return value.new_full((*query.shape[:3], value.shape[3]), 7.0)

    assert (block_diffusion_attention(*inputs, mask, attend) == 7).all()


@pytest.mark.parametrize("n", [1, 4, 20])
@pytest.mark.parametrize("backend", [*EXECUTORS, partial(varlen.varlen_attention, kernel=dense_varlen)])
def test_a_row_of_a_shadow_sees_all_but_the_token_that_it_shadows(n: int, backend: Any) -> None:
    """Of a sequence of n tokens before the end of a block that begins at its last but 4th; beside another."""
    start, m = max(n - 4, 0), min(n, 4)
    own, shadow, other = np.arange(3, 3 + n), np.arange(50, 50 + m), np.arange(60, 68)
    parts = [PoolPart(start, own), PoolPart(0, other), PoolPart(slice(start, n), own, shadow)]
    keys = PooledKeys(KeyPool(80), parts, 4)
    assert keys.positions.tolist() == [*range(start, n), *range(8), *range(start, n)]
    blocks, _ = row_blocks(keys.rectangle)
    assert len({*blocks[0, -m:].tolist()}) == 1 and blocks[0, -1] not in blocks[0, :-m]
    assert keys.rectangle.visible_pairs() == int(keys.rectangle.dense().sum())
    generator = torch.Generator().manual_seed(n)
    pooled = [torch.randn(80, 2, 8, generator=generator, dtype=torch.float64) for _ in "kv"]
    for kept, rows in zip(keys.pool.of_layer(1, *(each[:, None] for each in pooled)), pooled, strict=True):
        kept.copy_(rows)
    at = np.concatenate([own[start:], other, shadow])
    query = torch.randn(len(at), 1, 4, 8, generator=generator, dtype=torch.float64)
    found = keys.of(*(rows[at][:, None] for rows in pooled), 1, None)
    output = block_diffusion_attention(query, *found, keys.rectangle, backend)
    visible = torch.zeros(len(at), 80, dtype=torch.bool)
    visible[:m, own] = True
    visible[m : m + 4, other[:4]] = visible[m + 4 : m + 8, other] = True
    visible[m + 8 :, own] = visible[m + 8 :, shadow] = True
    visible[np.arange(m + 8, 2 * m + 8), own[start:]] = False
    key, value = (rows.repeat_interleave(2, dim=1) for rows in pooled)
    scores = torch.einsum("qhd,khd->hqk", query[:, 0], key) * 8**-0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(output[:, 0], torch.einsum("hqk,khd->qhd", weights, value))
