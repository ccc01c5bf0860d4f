"""Rows as entries of a variable-length call, against the reference; the kernel is a stand-in."""

import gc
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from llada_megatron.attention import BlockDiffusionMask, block_diffusion_attention, varlen
from llada_megatron.attention.keys import KeyPool, PooledKeys
from llada_megatron.config.errors import BadInput
from tests.attention.dense_varlen import dense_varlen
from tests.attention.test_flex_torch import draw_qkv
from tests.attention.test_intervals import rectangles
from tests.attention.test_keys import PARTS

CPU = torch.device("cpu")
attend = partial(varlen.varlen_attention, kernel=dense_varlen)


@settings(max_examples=150)
@given(rectangle=rectangles().filter(lambda rectangle: not rectangle.mask.clean_copy))
def test_output_equals_the_reference(rectangle):
    qkv = draw_qkv(rectangle)
    expected = block_diffusion_attention(*qkv, rectangle, "reference", softmax_scale=0.3)
    torch.testing.assert_close(
        block_diffusion_attention(*qkv, rectangle, attend, softmax_scale=0.3), expected
    )


def decoding(parts, block_size):
    places = [(kept, np.arange(length)) for kept, length in parts]
    return PooledKeys(KeyPool(400), places, block_size).rectangle


@pytest.mark.parametrize("parts", list(PARTS))
@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_rows_of_a_cache_equal_the_reference(block_size, parts):
    rectangle = decoding(PARTS[parts], block_size)
    qkv = draw_qkv(rectangle)
    expected = block_diffusion_attention(*qkv, rectangle, "reference")
    torch.testing.assert_close(block_diffusion_attention(*qkv, rectangle, attend), expected)


@pytest.mark.parametrize(
    ("parts", "calls"),
    [
        ([(32, 40)], 1),  # an active block
        ([(32, 40), (0, 8), (96, 104)], 1),  # of each of three
        ([(32, 40), (24, 40)], 2),  # the second one's was just done
        ([(32, 40), (0, 40)], 5),  # a prompt is read beside it
        ([(32, 40), (32, 32)], 1),  # keys of which no row is here
    ],
)
def test_a_rectangle_takes_as_many_calls_as_a_sequence_has_blocks_of_rows(parts, calls):
    found = varlen.calls_of(decoding(parts, 8), CPU)
    assert len(found) == calls and (found[0].rows is None) == (calls == 1)
    assert len({len(call.row_edges) for call in found}) == 1  # empty entries make the numbers alike


def test_a_call_becomes_another_one_in_place():
    ours, theirs = ([(32, 40), (64, 72)], [(0, 8), (16, 24)])
    rectangle, other = decoding(ours, 8), decoding(theirs, 8)
    (call,), (source,) = (varlen.calls_of(each, CPU) for each in (rectangle, other))
    address = call.key_edges.data_ptr()
    call.copy_(source)
    assert call.key_edges.data_ptr() == address and torch.equal(call.key_edges, source.key_edges)
    # The longer rectangle's tensors now attend as the shorter one's, whose keys lie first.
    query, key, value = draw_qkv(rectangle)
    seen = other.keys
    expected = block_diffusion_attention(query, key[:seen], value[:seen], other, "reference")
    torch.testing.assert_close(block_diffusion_attention(query, key, value, rectangle, attend), expected)


def test_layers_share_the_calls_of_a_rectangle_which_are_freed_with_it():
    held_before = len(varlen._calls)
    rectangle = decoding([(32, 40)], 8)
    first = varlen.calls_of(rectangle, CPU)
    assert varlen.calls_of(rectangle, CPU) is first
    del rectangle
    gc.collect()
    assert len(varlen._calls) <= held_before


def test_torch_is_called_by_its_documentation():
    rectangle = decoding([(32, 40), (0, 8)], 8)
    (call,) = varlen.calls_of(rectangle, CPU)
    query, key, value = (tensor[:, 0] for tensor in draw_qkv(rectangle))
    with mock.patch("torch.nn.attention.varlen.varlen_attn", autospec=True) as kernel:
        varlen.flash_attention(query, key, value, call, 0.3)
    (*tensors, longest, keys), named = kernel.call_args
    expected = query, key, value, call.row_edges, call.key_edges
    assert all(a is b for a, b in zip(tensors, expected, strict=True))
    assert (longest, keys) == (16, 48)
    assert named == {"scale": 0.3, "enable_gqa": True, "num_splits": 1}


def test_a_clean_copy_is_refused():
    mask_of_training = BlockDiffusionMask([torch.tensor([0, 12])], 4)
    qkv = [torch.zeros(24, 1, 2, 8)] * 3
    with pytest.raises(BadInput, match=r"varlen serves decoding alone, not \[x_t ; x_0\]"):
        block_diffusion_attention(*qkv, mask_of_training, attend)
