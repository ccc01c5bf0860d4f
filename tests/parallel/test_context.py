"""Dealing tokens out to context-parallel ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.config.errors import BadInput
from llada_megatron.data.synthetic import log_normal_documents
from llada_megatron.parallel.context import deal_tokens


def log_normal_mask(length, seed, *arguments):
    return BlockDiffusionMask([torch.tensor(log_normal_documents(6.5, 1.0, seed, length))], *arguments)


def work_of_ranks(mask, owner, ranks):
    return np.bincount(owner, weights=mask.pairs_per_token[0], minlength=ranks)


def blocks_that_span_ranks(mask, owner):
    starts = np.unique(mask.block_start[0])
    return sum(len(set(part.tolist())) > 1 for part in np.split(owner, starts[1:]))


@st.composite
def masks(draw):
    ranks = draw(st.integers(1, 6))
    length = ranks * draw(st.integers(1, 50))
    inner = draw(st.sets(st.integers(1, length - 1), max_size=6)) if length > 1 else set()
    grid = draw(st.sampled_from(["sequence", "document"]))
    block_size = draw(st.integers(1, length))
    return BlockDiffusionMask([torch.tensor([0, *sorted(inner), length])], block_size, grid), ranks


@given(masks())
def test_every_rank_owns_exactly_its_share_of_the_tokens(mask_and_ranks):
    mask, ranks = mask_and_ranks
    owner = deal_tokens(mask.pairs_per_token[0], mask.block_start[0], mask.block_size, ranks)
    assert np.array_equal(np.bincount(owner, minlength=ranks), np.full(ranks, mask.length // ranks))


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("length", [4096, 8192, 32768])
def test_packed_documents_are_balanced_within_two_percent_in_whole_blocks(length, ranks):
    for seed in range(8):
        mask = log_normal_mask(length, seed, 32)
        owner = ContextShard(mask, 0, ranks).owner[0]
        work = work_of_ranks(mask, owner, ranks)
        assert work.max() / work.mean() <= 1.02
        assert blocks_that_span_ranks(mask, owner) == 0


@pytest.mark.parametrize("block_size, ranks", [(1024, 4), (2048, 2), (1024, 8)])
def test_blocks_too_long_to_balance_are_cut(block_size, ranks):
    mask = BlockDiffusionMask([torch.tensor([0, 4096])], block_size)
    owner = ContextShard(mask, 0, ranks).owner[0]
    work = work_of_ranks(mask, owner, ranks)
    assert work.max() / work.mean() <= 1.02
    assert blocks_that_span_ranks(mask, owner) == 4096 // block_size


def test_blocks_of_the_document_grid_are_cut_only_where_a_rank_is_full():
    mask = log_normal_mask(8192, 0, 32, "document")
    owner = ContextShard(mask, 0, 4).owner[0]
    assert 0 < blocks_that_span_ranks(mask, owner) <= 8


def in_turns(mask, sizes):
    """The mask with noise groups of so many blocks, in turns, which begin anew with each document."""
    place = np.arange(mask.length)
    block = np.cumsum(mask.block_start[0] == place) - 1
    in_document = block - block[mask.document_start[0]]
    begins = np.isin(in_document % sum(sizes), np.append(0, np.cumsum(sizes)[:-1]))
    begins &= mask.block_start[0] == place
    return replace(mask, group_starts=np.maximum.accumulate(np.where(begins, place, 0))[None])


def rows_received(shard):
    """Key rows that a rank gets from each of the others, over those of gathering both halves."""
    own = shard.tokens.size
    return (own + len(shard.halo_rows)) / (2 * own)


@pytest.mark.parametrize(
    ("length", "ranks", "sizes"), [(4096, 4, [2]), (16384, 8, [2]), (16384, 4, [3, 2, 4]), (32768, 16, [4])]
)
@pytest.mark.parametrize("grid", ["sequence", "document"])
def test_groups_of_packed_documents_are_balanced_and_about_half_the_keys_travel(length, ranks, sizes, grid):
    for seed in range(4):
        shard = ContextShard(in_turns(log_normal_mask(length, seed, 32, grid), sizes), 0, ranks)
        work = work_of_ranks(shard.mask, shard.owner[0], ranks)
        assert work.max() / work.mean() <= 1.02
        assert 0.5 <= rows_received(shard) <= 0.55


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_half_the_keys_travel_where_the_groups_of_a_sequence_are_whole(blocks, ranks):
    mask = in_turns(BlockDiffusionMask([torch.tensor([0, 8192])], 32), [blocks])
    shard = ContextShard(mask, 0, ranks)
    work = work_of_ranks(mask, shard.owner[0], ranks)
    assert work.max() / work.mean() <= 1.02
    assert rows_received(shard) == 0.5


def test_a_length_that_ranks_cannot_share_is_refused():
    with pytest.raises(BadInput, match=r"100 tokens cannot be split evenly over 3 ranks: change layout\.cp"):
        deal_tokens(np.ones(100), np.arange(100), 1, 3)
