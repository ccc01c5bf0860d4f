"""What the executor relies on about tiles, beyond that they cover the mask."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.keys import KeyPool, PooledKeys
from llada_megatron.attention.tiles import CALL_PAIRS, tiling
from tests.attention.test_executors import rectangles


def stages_of(tiled):
    return [*(stage for segment in tiled.segments for stage in segment.stages), *tiled.stages]


def tiles_of(call):
    """Rows and keys of every tile, without padding."""
    padding = np.zeros_like(call.rows, dtype=bool) if call.padding is None else call.padding
    pairs = zip(call.rows, padding, call.keys, strict=True)
    return [(rows[~is_padding], np.unique(keys)) for rows, is_padding, keys in pairs]


@settings(max_examples=150)
@given(rectangle=rectangles())
def test_tiles_of_a_stage_share_no_row_and_tiles_of_a_call_no_key(rectangle):
    """Results are merged row by row, and gradients of keys are added in place."""
    for stage in stages_of(tiling(rectangle)):
        rows = np.concatenate([rows for call in stage for rows, _ in tiles_of(call)])
        assert len(np.unique(rows)) == len(rows)
        for call in stage:
            keys = np.concatenate([keys for _, keys in tiles_of(call)])
            assert len(np.unique(keys)) == len(keys)


@pytest.mark.parametrize("block_size", [1, 4, 40, 3000])
@pytest.mark.parametrize("clean_copy, causal", [(True, False), (False, False), (False, True)])
def test_padding_costs_no_more_than_a_call(clean_copy, causal, block_size):
    random = np.random.default_rng(0)
    boundaries = np.sort(random.choice(np.arange(1, 3000), 40, replace=False))
    documents = [
        torch.tensor([0, *boundaries, 3000]),
        torch.tensor([0, 200, *(3000 - boundaries[::-1]), 3000]),
    ]
    documents[1] = documents[1].unique()
    mask = BlockDiffusionMask(documents, block_size, clean_copy=clean_copy, causal=causal)
    for stage in stages_of(tiling(mask.whole())):
        for call in stage:
            needed = sum(len(rows) * len(keys) for rows, keys in tiles_of(call))
            assert call.pairs - needed <= CALL_PAIRS


def test_samples_that_are_alike_share_their_tiles():
    samples = [torch.tensor([0, 40, 100])] * 5
    assert tiling(BlockDiffusionMask(samples, 4).whole()).shared
    assert not tiling(BlockDiffusionMask([*samples, torch.tensor([0, 100])], 4).whole()).shared


def test_short_documents_are_computed_together():
    """A loop over documents would take hundreds of calls."""
    for grid in ("sequence", "document"):
        mask = BlockDiffusionMask([torch.arange(0, 2049, 16)], 4, grid)
        assert sum(map(len, stages_of(tiling(mask.whole())))) <= 6


def test_rows_of_a_decoded_block_are_one_tile_with_all_their_keys_and_a_prompts_are_not() -> None:
    parts = [(480, np.arange(512)), (96, np.arange(128)), (0, np.arange(1024))]
    blocks = PooledKeys(KeyPool(1), parts[:2], 32).rectangle
    assert [[call.rows.shape for call in stage] for stage in tiling(blocks).stages] == [[(1, 32), (1, 32)]]
    assert tiling(blocks).pairs == 32 * 512 + 32 * 128 == blocks.visible_pairs()
    beside_a_prompt = PooledKeys(KeyPool(1), parts, 32).rectangle
    assert beside_a_prompt.visible_pairs() <= tiling(beside_a_prompt).pairs < 1.2 * 1024**2 / 2
