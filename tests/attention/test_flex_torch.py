"""FlexAttention on the CPU, where it serves inference: its output against the reference."""

import gc

import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention.flex_attention import create_block_mask

from llada_megatron.attention import BlockDiffusionMask, block_diffusion_attention, flex_torch
from llada_megatron.config.errors import BadInput
from tests.attention.test_intervals import rectangles

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def draw_qkv(rectangle, heads=4, kv_heads=2, head_dim=16, dtype=torch.float64):
    torch.manual_seed(0)
    query = torch.randn(rectangle.queries, rectangle.batch, heads, head_dim, dtype=dtype)
    key, value = torch.randn(2, rectangle.keys, rectangle.batch, kv_heads, head_dim, dtype=dtype)
    return query, key, value


@settings(max_examples=40)
@given(rectangle=rectangles())
def test_output_equals_the_reference(rectangle):
    qkv = draw_qkv(rectangle)
    expected = block_diffusion_attention(*qkv, rectangle, "reference")
    torch.testing.assert_close(block_diffusion_attention(*qkv, rectangle, "flex_torch"), expected)


@pytest.mark.parametrize("value_dim", [4, 24])
def test_values_of_another_width_than_keys_equal_the_reference(value_dim):
    rectangle = BlockDiffusionMask([torch.tensor([0, 13, 24])], 4).whole()
    query, key, _ = draw_qkv(rectangle)
    value = torch.randn(*key.shape[:3], value_dim, dtype=key.dtype)
    expected = block_diffusion_attention(query, key, value, rectangle, "reference")
    got = block_diffusion_attention(query, key, value, rectangle, "flex_torch")
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("block_size", [1, 32, 200, 300])
def test_output_equals_the_reference_over_several_tiles(block_size):
    documents = [torch.tensor([0, 130, 300]), torch.tensor([0, 300])]
    rectangle = BlockDiffusionMask(documents, block_size).whole()
    qkv = draw_qkv(rectangle, kv_heads=4)
    expected = block_diffusion_attention(*qkv, rectangle, "reference", softmax_scale=0.3)
    got = block_diffusion_attention(*qkv, rectangle, "flex_torch", softmax_scale=0.3)
    torch.testing.assert_close(got, expected)


def listed(count, columns):
    """The tiles of a table as bool [B, query tiles, key tiles]."""
    place = torch.arange(columns.size(-1)).expand_as(columns)
    tiles = torch.zeros(columns.shape, dtype=torch.bool)
    return tiles.scatter(-1, columns.long(), place < count[..., None])[:, 0]


@settings(max_examples=40)
@given(rectangle=rectangles(max_length=300))
def test_the_tables_of_tiles_are_those_that_torch_finds_pair_by_pair(rectangle):
    # The uncompiled form on a CPU reads the mask function alone; kernels read these tables.
    ours = flex_torch._block_mask(rectangle, torch.device("cpu"))
    shape = rectangle.batch, None, rectangle.queries, rectangle.keys
    theirs = create_block_mask(ours.mask_mod, *shape, device="cpu", BLOCK_SIZE=flex_torch.TILE)
    assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for keys in ("kv", "q"):
        partial, whole, all_partial, all_whole = (
            listed(getattr(table, f"{kind}{keys}_num_blocks"), getattr(table, f"{kind}{keys}_indices"))
            for table in (ours, theirs)
            for kind in ("", "full_")
        )
        assert not (partial & whole).any()
        assert torch.equal(partial | whole, all_partial | all_whole)
        # Two intervals that meet inside a tile may fill it together; the mask function then shows all of it.
        assert not (whole & ~all_whole).any()
        if not rectangle.mask.clean_copy:
            assert torch.equal(whole, all_whole)


def test_training_on_a_cpu_is_refused_and_inference_is_not():
    rectangle = BlockDiffusionMask([torch.tensor([0, 12])], 4).whole()
    query, key, value = draw_qkv(rectangle)
    needs_gradient = query * torch.ones((), dtype=query.dtype, requires_grad=True)
    with pytest.raises(BadInput, match=r"flex_torch has no backward on a CPU.*inference only"):
        block_diffusion_attention(needs_gradient, key, value, rectangle, "flex_torch")
    with torch.no_grad():
        block_diffusion_attention(query, key, value, rectangle, "flex_torch")


def test_the_block_mask_is_made_once_per_rectangle_and_freed_with_it(monkeypatch):
    made = []
    make = flex_torch._block_mask
    monkeypatch.setattr(flex_torch, "_block_mask", lambda *arguments: made.append(1) or make(*arguments))
    mask = BlockDiffusionMask([torch.tensor([0, 12])], 4)
    rectangle = mask.whole()
    held_before = len(flex_torch._block_masks)
    for _layer in range(3):
        block_diffusion_attention(*draw_qkv(rectangle), rectangle, "flex_torch")
    assert len(made) == 1 and len(flex_torch._block_masks) == held_before + 1
    del rectangle
    gc.collect()
    assert len(flex_torch._block_masks) <= held_before
