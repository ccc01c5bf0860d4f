from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.attention.mask import block_starts
from llada_megatron.config.schema import BlockGrid, DiffusionConfig, RatePer
from llada_megatron.objectives.corruption import corrupt

L = 48
ONE = np.array([0, L])
THREE = np.array([0, 7, 30, L])
BOTH_RATES = pytest.mark.parametrize("t_per", list(RatePer))


@st.composite
def boundaries(draw):
    cuts = draw(st.sets(st.integers(1, L - 1), max_size=6))
    return np.array([0, *sorted(cuts), L], dtype=np.int32)


@given(cu_seqlens=boundaries(), block_size=st.sampled_from([1, 3, 4, 16, L]), grid=st.sampled_from(BlockGrid))
def test_a_block_starts_where_its_first_token_of_document_and_grid_cell_is(cu_seqlens, block_size, grid):
    document = [int(np.searchsorted(cu_seqlens, i, side="right")) - 1 for i in range(L)]
    origin = [int(cu_seqlens[d]) if grid is BlockGrid.document else 0 for d in document]
    key = [(document[i], (i - origin[i]) // block_size) for i in range(L)]
    assert block_starts(cu_seqlens, block_size, grid).tolist() == [key.index(each) for each in key]


def test_the_rate_lies_in_its_range_and_fills_it():
    diffusion = DiffusionConfig(mask_rate_min=0.3, mask_rate_max=0.8)
    rates = np.array([corrupt(1, index, ONE, 4, diffusion).rate[0] for index in range(4000)])
    assert rates.min() >= 0.3 and rates.max() <= 0.8
    assert abs(rates.mean() - 0.55) < 4 * rates.std() / np.sqrt(len(rates))
    assert abs(rates.std() - 0.5 / np.sqrt(12)) < 0.005


def test_the_rate_is_shared_by_a_sequence_or_by_a_block():
    per_sequence = corrupt(1, 3, THREE, 4, DiffusionConfig())
    assert len(np.unique(per_sequence.rate)) == 1
    per_block = corrupt(1, 3, THREE, 4, DiffusionConfig(t_per=RatePer.block))
    starts = block_starts(THREE, 4, BlockGrid.sequence)
    assert len(np.unique(per_block.rate)) == len(np.unique(starts))
    assert all(len(np.unique(per_block.rate[starts == start])) == 1 for start in starts)


@BOTH_RATES
def test_a_token_is_masked_as_often_as_its_rate_says(t_per):
    diffusion = DiffusionConfig(t_per=t_per)
    drawn = [corrupt(1, index, THREE, 4, diffusion) for index in range(3000)]
    rate = np.concatenate([each.rate for each in drawn])
    masked = np.concatenate([each.masked for each in drawn])
    for low in np.arange(0, 1, 0.25):
        inside = (rate >= low) & (rate < low + 0.25)
        error = np.sqrt((rate * (1 - rate))[inside].mean() / inside.sum())
        assert abs(masked[inside].mean() - rate[inside].mean()) < 4 * error


@BOTH_RATES
def test_draws_depend_on_seed_and_sample_alone(t_per):
    diffusion = DiffusionConfig(t_per=t_per)
    forwards = [corrupt(5, index, THREE, 4, diffusion) for index in range(20)]
    np.random.seed(0)
    for index in reversed(range(20)):
        np.random.random(index)  # the ambient generator takes no part
        again = corrupt(5, index, THREE, 4, diffusion)
        assert np.array_equal(again.masked, forwards[index].masked)
        assert np.array_equal(again.rate, forwards[index].rate)
    rates = {each.rate.tobytes() for each in forwards}
    rates |= {corrupt(6, index, THREE, 4, diffusion).rate.tobytes() for index in range(20)}
    assert len(rates) == 40


def test_documents_do_not_change_the_draws_of_a_sequence():
    one, three = (corrupt(1, 9, cu, 4, DiffusionConfig()) for cu in (ONE, THREE))
    assert np.array_equal(one.masked, three.masked) and np.array_equal(one.rate, three.rate)


@BOTH_RATES
def test_complementary_pairs_partition_the_positions(t_per):
    diffusion = DiffusionConfig(complementary=True, mask_rate_max=0.9, t_per=t_per)
    for pair in range(50):
        first, second = (corrupt(1, 2 * pair + half, THREE, 4, diffusion) for half in (0, 1))
        assert np.array_equal(first.masked, ~second.masked)
        assert np.allclose(first.rate + second.rate, 1)


def test_a_pair_masks_every_supervised_token_once_and_no_other():
    supervised = np.random.default_rng(0).random(int(THREE[-1])) < 0.5
    diffusion = DiffusionConfig(complementary=True, mask_rate_max=0.9)
    for pair in range(20):
        first, second = (corrupt(1, 2 * pair + half, THREE, 4, diffusion, supervised) for half in (0, 1))
        assert (first.masked.astype(int) + second.masked == supervised).all()


def test_a_rate_per_document_is_one_number_for_each():
    rate = corrupt(1, 3, THREE, 4, DiffusionConfig(t_per=RatePer.document)).rate
    pieces = np.split(rate, THREE[1:-1])
    assert all((piece == piece[0]).all() for piece in pieces)
    assert len({piece[0] for piece in pieces}) == len(pieces)


@pytest.mark.parametrize("t_per", [RatePer.block, RatePer.document])
def test_antithetic_rates_are_one_in_each_equal_part_and_uniform_for_each_block(t_per):
    diffusion = DiffusionConfig(t_per=t_per, antithetic=True, mask_rate_min=0.2, mask_rate_max=0.8)
    drawn = [corrupt(1, index, THREE, 4, diffusion) for index in range(2000)]
    starts = block_starts(THREE, 4, BlockGrid.sequence) if t_per is RatePer.block else THREE[:-1]
    firsts = np.unique(starts)
    rates = np.array([each.rate[firsts] for each in drawn])
    parts = np.floor((rates - 0.2) / 0.6 * len(firsts))
    assert (np.sort(parts, axis=1) == np.arange(len(firsts))).all()
    error = 0.6 / np.sqrt(12 * len(rates))
    assert (abs(rates.mean(axis=0) - 0.5) < 4 * error).all()
    assert all(len(np.unique(piece)) == 1 for piece in np.split(drawn[0].rate, firsts[1:]))


def test_resampled_shares_lie_within_the_clip_wherever_some_number_does():
    supervised = np.random.default_rng(0).random(int(THREE[-1])) < 0.7
    diffusion = DiffusionConfig(t_per=RatePer.block, mask_rate_min=0.3, mask_rate_max=0.7, resample=True)
    once = replace(diffusion, resample=False)
    starts = block_starts(THREE, 4, BlockGrid.sequence)
    changed = 0
    for index in range(100):
        masked = corrupt(1, index, THREE, 4, diffusion, supervised).masked
        before = corrupt(1, index, THREE, 4, once, supervised).masked
        changed += (masked != before).any()
        for start in np.unique(starts):
            block, tokens = starts == start, int(supervised[starts == start].sum())
            allowed = [n for n in range(tokens + 1) if 0.3 * tokens <= n <= 0.7 * tokens and tokens]
            count = int(before[block].sum())
            if not allowed or count in allowed:
                assert (masked[block] == before[block]).all()
            else:
                assert masked[block].sum() in allowed
    assert changed > 50


def test_a_range_that_clips_nothing_keeps_empty_masks():
    diffusion = DiffusionConfig(t_per=RatePer.block)
    for index in range(20):
        again = corrupt(1, index, THREE, 4, replace(diffusion, resample=True))
        assert np.array_equal(again.masked, corrupt(1, index, THREE, 4, diffusion).masked)
