"""Endpoints, tiles and mask functions against the dense mask, for every view and rectangle."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.attention import BlockDiffusionMask, Rectangle
from llada_megatron.attention.intervals import endpoints, mask_mod, tile_occupancy
from tests.attention.test_executors import grouped

VIEWS = [(True, False), (False, False), (False, True)]  # clean_copy, causal


@st.composite
def rectangles(draw, max_length=70):
    """Whole masks, and rows with gaps whose noisy keys hold a halo and padding."""
    length = draw(st.integers(1, max_length))
    inner = st.sets(st.integers(1, length - 1), max_size=6) if length > 1 else st.just(set())
    cu_seqlens = [torch.tensor([0, *sorted(draw(inner)), length]) for _ in range(draw(st.integers(1, 3)))]
    block_size = draw(st.integers(1, length))
    grid = draw(st.sampled_from(["sequence", "document"]))
    mask = BlockDiffusionMask(cu_seqlens, block_size, grid, *draw(st.sampled_from(VIEWS)))
    if mask.clean_copy and draw(st.booleans()):
        mask = grouped(mask, 0.5, np.random.default_rng(draw(st.integers(0, 2**32 - 1))))
    if draw(st.booleans()):
        return mask.whole()
    count = draw(st.integers(1, length))
    tokens = np.stack([sorted(draw(st.permutations(range(length)))[:count]) for _ in cu_seqlens])
    if not mask.clean_copy:
        return Rectangle(mask, tokens, tokens[:, :0])
    extra = draw(st.lists(st.integers(0, length - 1), max_size=4))
    noisy = [
        np.union1d(np.flatnonzero(np.isin(starts, starts[own])), extra).astype(np.int64)
        for starts, own in zip(mask.group_start, tokens, strict=True)
    ]
    size = max(map(len, noisy)) + draw(st.integers(0, 3))
    padded = [np.pad(keys, (0, size - len(keys)), constant_values=length) for keys in noisy]
    return Rectangle(mask, tokens, np.stack(padded))


def dense(rectangle):
    return torch.stack([rectangle.dense(sample) for sample in range(rectangle.batch)]).numpy()


@given(rectangle=rectangles())
def test_a_row_sees_the_union_of_its_intervals(rectangle):
    ends = endpoints(rectangle)
    key = np.arange(rectangle.keys)
    seen = key < ends[:, 0, :, None]
    for i in range(1, ends.shape[1], 2):
        seen |= (key >= ends[:, i, :, None]) & (key < ends[:, i + 1, :, None])
    assert np.array_equal(seen, dense(rectangle))


@given(rectangle=rectangles())
def test_endpoints_are_odd_in_number_never_fall_and_stay_among_the_keys(rectangle):
    ends = endpoints(rectangle)
    assert ends.dtype == np.int32 and ends.shape[1] % 2 == 1
    assert (np.diff(ends, axis=1) >= 0).all()
    assert ends.min() >= 0 and ends.max() <= rectangle.keys


def test_masks_that_allow_fewer_endpoints_get_fewer():
    packed, one_document = [torch.tensor([0, 5, 12])], [torch.tensor([0, 12])]
    counts = [
        endpoints(BlockDiffusionMask(documents, 4, "sequence", *view).whole()).shape[1]
        for view in VIEWS
        for documents in (packed, one_document)
    ]
    assert counts == [5, 5, 3, 1, 3, 1]


@given(rectangle=rectangles(), tile=st.sampled_from([1, 4, 16, 128]))
def test_tiles_are_visible_or_whole_where_the_dense_mask_is(rectangle, tile):
    visible, whole = tile_occupancy(endpoints(rectangle), rectangle.keys, tile)
    mask = dense(rectangle)
    padding = [(0, 0), *((0, -size % tile) for size in mask.shape[1:])]
    batch, queries, keys = np.pad(mask, padding).shape
    tiles = np.pad(mask, padding).reshape(batch, queries // tile, tile, keys // tile, tile)
    assert np.array_equal(visible, tiles.any(axis=(2, 4)))
    # Two intervals that meet inside a tile may fill it together: then it only counts as not whole.
    assert not (whole & ~tiles.all(axis=(2, 4))).any()
    if endpoints(rectangle).shape[1] < 5:
        assert np.array_equal(whole, tiles.all(axis=(2, 4)))


def test_most_visible_tiles_of_a_long_sequence_are_whole():
    mask = BlockDiffusionMask([torch.tensor([0, 4096])], 32)
    visible, whole = tile_occupancy(endpoints(mask.whole()), mask.total, 128)
    assert whole.sum() > 0.9 * visible.sum()
    assert visible.mean() == pytest.approx(mask.visible_pairs() / mask.total**2, rel=0.1)


@given(rectangle=rectangles(max_length=20))
def test_the_mask_function_is_the_dense_mask(rectangle):
    visible = mask_mod(torch.tensor(endpoints(rectangle)))
    sample, query, key = (
        torch.arange(n).view(shape)
        for n, shape in (
            (rectangle.batch, (-1, 1, 1)),
            (rectangle.queries, (1, -1, 1)),
            (rectangle.keys, (1, 1, -1)),
        )
    )
    assert np.array_equal(visible(sample, torch.tensor(0), query, key).numpy(), dense(rectangle))
