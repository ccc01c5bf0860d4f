"""Dealing tokens out to context-parallel ranks."""

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


def test_a_length_that_ranks_cannot_share_is_refused():
    with pytest.raises(BadInput, match=r"100 tokens cannot be split evenly over 3 ranks: change layout\.cp"):
        deal_tokens(np.ones(100), np.arange(100), 1, 3)
