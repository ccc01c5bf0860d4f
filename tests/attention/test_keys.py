"""Rows against kept keys are the same rows of a full forward; values may be narrower or wider than keys."""

import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask, block_diffusion_attention, select_backend
from llada_megatron.attention.keys import KeyRange
from llada_megatron.config.errors import BadInput

L = 24
EXECUTORS = ("reference", "portable")


def tensors(mask: BlockDiffusionMask, value_dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(mask.block_size)
    sizes = (4, 8), (2, 8), (2, value_dim)
    return [torch.randn(mask.total, mask.batch, *s, generator=generator, dtype=torch.float64) for s in sizes]


@pytest.mark.parametrize("backend", EXECUTORS)
@pytest.mark.parametrize("boundaries", [[0, L], [0, 9, L]], ids=["one document", "two documents"])
@pytest.mark.parametrize("block_size", [1, 4, 7, L])
def test_the_last_block_with_kept_keys_equals_its_rows_of_a_full_forward(
    block_size: int, boundaries: list[int], backend: str
) -> None:
    cu_seqlens = [torch.tensor([0, L]), torch.tensor(boundaries)]
    mask = BlockDiffusionMask(cu_seqlens, block_size, clean_copy=False, causal=True)
    query, key, value = tensors(mask, value_dim=6)
    full = block_diffusion_attention(query, key, value, mask, backend)
    start = int(mask.block_start[0, -1])
    kept = {layer: (layer * key[:start], layer * value[:start]) for layer in (1, 2)}
    keys = KeyRange(mask, start, kept).to(torch.device("cpu"))
    own = query[start:], key[start:], value[start:]
    all_keys = keys.of(*own[1:], layer=1, group=None)
    rows = block_diffusion_attention(own[0], *all_keys, keys.rectangle, backend)
    torch.testing.assert_close(rows, full[start:], atol=1e-12, rtol=0)
    if start:
        assert torch.equal(keys.of(*own[1:], layer=2, group=None)[0][:start], 2 * key[:start])


def test_a_range_needs_rows_of_a_causal_mask() -> None:
    causal = BlockDiffusionMask([torch.tensor([0, L])], 4, clean_copy=False, causal=True)
    with pytest.raises(ValueError, match="start from 0 to 23, got 24"):
        KeyRange(causal, L, {})
    with pytest.raises(ValueError, match="causal=False"):
        KeyRange(BlockDiffusionMask([torch.tensor([0, L])], 4), 0, {})


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


@pytest.mark.parametrize("name", ["flex_torch", "cudnn_graph", "cudnn_flex"])
def test_an_executor_of_one_width_says_so(name: str) -> None:
    with pytest.raises(BadInput, match=f"{name} serves values as wide as keys, not 64 wide for keys of 96"):
        select_backend(name, torch.device("cuda"), torch.bfloat16, 96, True, 64)
    _, line = select_backend("auto", torch.device("cuda"), torch.bfloat16, 96, True, 64)
    assert line.startswith("portable") and name in line


def test_an_executor_can_be_handed_in() -> None:
    mask = BlockDiffusionMask([torch.tensor([0, L])], 4)
    inputs = tensors(mask, value_dim=6)

    def attend(query, key, value, rectangle, scale):
        assert rectangle.mask is mask and scale == 8**-0.5  # of the key's width
        return value.new_full((*query.shape[:3], value.shape[3]), 7.0)

    assert (block_diffusion_attention(*inputs, mask, attend) == 7).all()
