"""Whole conversations into sequences: each once, none over the edge, little room left."""

import numpy as np
import pytest

from llada_megatron.data.packing import best_fit, quantised


def log_normal(count: int, mean: float, longest: int) -> np.ndarray:
    """Lengths of conversations, log-normal with sigma 1, as chat corpora have them."""
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.clip(drawn.astype(np.int64), 1, longest)


@pytest.mark.parametrize("quantum", [1, 32])
def test_every_conversation_lies_in_one_sequence_and_fits(quantum):
    lengths = quantised(log_normal(3000, 100, 1000), quantum)
    packing = best_fit(lengths, 1024, seed=1)
    assert sorted(packing.items.tolist()) == list(range(len(lengths)))
    assert max(lengths[packing[sequence]].sum() for sequence in range(len(packing))) <= 1024


def test_log_normal_lengths_leave_less_than_three_percent_of_padding():
    mean, L = 512, 8 * 512
    lengths = log_normal(20_000, mean, L)
    packing = best_fit(quantised(lengths, 32), L, seed=1)
    assert 1 - lengths.sum() / (len(packing) * L) < 0.03
    assert 1 - quantised(lengths, 32).sum() / (len(packing) * L) < 0.002  # what best fit itself leaves


def test_the_seed_decides_who_meets_whom_and_nothing_else_does():
    lengths = log_normal(500, 100, 1000)
    first, again, other = (best_fit(lengths, 1024, seed) for seed in (1, 1, 2))
    assert (first.items == again.items).all() and (first.starts == again.starts).all()
    assert not np.array_equal(first.items, other.items)


def test_lengths_are_rounded_up_to_whole_quanta():
    assert quantised(np.array([1, 32, 33]), 32).tolist() == [32, 32, 64]
