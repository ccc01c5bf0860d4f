"""The bound against its definition: E_k E_{|M| = k} [ m/k sum_{i in M} CE_i(M) ] for every block."""

import itertools
import math

import numpy as np
import pytest

from llada_megatron.attention.mask import block_starts
from llada_megatron.config.schema import BlockGrid
from llada_megatron.objectives.bound import antithetic_count_mask, exact_count_mask

BLOCK = 4
DOCUMENTS = np.array([0, 6, 19, 24])  # off the grid: blocks of 4, 2, 2, 4, 4, 3, 1 and 4 tokens
STARTS = block_starts(DOCUMENTS, BLOCK, BlockGrid.sequence)
L = len(STARTS)
BLOCKS = {int(start): np.flatnonzero(start == STARTS) for start in np.unique(STARTS)}
# A toy model: CE of a position is a value of its own for every set of masked positions in its block.
CE = np.random.default_rng(7).exponential(size=(L, 2**BLOCK))


def cross_entropy(masked: np.ndarray) -> np.ndarray:
    pattern = [int((masked[BLOCKS[start]] << np.arange(len(BLOCKS[start]))).sum()) for start in STARTS]
    return CE[np.arange(L), pattern]


def bound_by_definition(block: np.ndarray) -> float:
    m, total = len(block), 0.0
    for k in range(1, m + 1):
        subsets = list(itertools.combinations(range(m), k))
        for subset in subsets:
            masked = np.zeros(L, dtype=bool)
            masked[block[list(subset)]] = True
            total += m / k * cross_entropy(masked)[masked].sum() / len(subsets) / m
    return total


def antithetic(seed: int, number: int, draw: int, draws: int, starts: np.ndarray):
    return antithetic_count_mask(seed, number, draw, draws, starts, np.ones(len(starts), dtype=bool))


def estimates(seed: int, sequences: int, draws: int, mask=exact_count_mask) -> np.ndarray:
    """Sum of every block, [sequences, blocks], averaged over the draws of a sequence."""
    found = np.zeros((sequences, len(BLOCKS)))
    for sequence in range(sequences):
        for draw in range(draws):
            masked, weights = mask(seed, sequence, draw, draws, STARTS)
            terms = weights * cross_entropy(masked)
            found[sequence] += [terms[block].sum() / draws for block in BLOCKS.values()]
    return found


@pytest.mark.parametrize(
    ("mask", "draws"), [(exact_count_mask, 1), (exact_count_mask, 3), (antithetic, 1), (antithetic, 4)]
)
def test_the_estimate_s_mean_is_the_bound_by_definition(mask, draws):
    found = estimates(seed=1, sequences=4000 // draws, draws=draws, mask=mask)
    for column, block in enumerate(BLOCKS.values()):
        error = found[:, column].std() / math.sqrt(len(found))
        assert abs(found[:, column].mean() - bound_by_definition(block)) <= 4 * error + 1e-12
    total = sum(bound_by_definition(block) for block in BLOCKS.values())
    sums = found.sum(axis=1)
    assert abs(sums.mean() - total) < 4 * sums.std() / math.sqrt(len(sums))


def test_blocks_of_one_token_give_the_exact_likelihood():
    masked, weights = exact_count_mask(1, 0, 0, 1, np.arange(L))
    assert masked.all() and (weights == 1).all()


def test_a_model_whose_cross_entropies_ignore_the_mask_gets_the_same_bound_from_every_count():
    flat = np.random.default_rng(0).exponential(size=L)
    drawn = [exact_count_mask(2, sequence, 0, 1, STARTS)[1] @ flat for sequence in range(4000)]
    assert abs(np.mean(drawn) - flat.sum()) < 4 * np.std(drawn) / math.sqrt(len(drawn))


@pytest.mark.parametrize("size", [2, 8, 32])
def test_each_block_masks_one_count_and_the_counts_are_uniform(size):
    starts = np.arange(64) // size * size
    counts = []
    for sequence in range(40 * size):
        masked, weights = exact_count_mask(3, sequence, 0, 1, starts)
        per_block = masked.reshape(-1, size).sum(axis=1)
        assert np.allclose(weights.reshape(-1, size).max(axis=1), size / per_block)
        assert not weights[~masked].any()
        counts += per_block.tolist()
    observed = np.bincount(counts, minlength=size + 1)
    assert observed[0] == 0
    expected = len(counts) / size
    chi_square = ((observed[1:] - expected) ** 2 / expected).sum()
    assert chi_square < (size - 1) + 5 * math.sqrt(2 * (size - 1))  # its mean and five deviations


def test_the_draws_of_a_block_step_through_its_counts():
    for sequence in range(20):
        counts = [int(exact_count_mask(4, sequence, d, 8, np.zeros(8, int))[0].sum()) for d in range(8)]
        assert sorted(counts) == list(range(1, 9))


def test_antithetic_draws_score_every_token_and_each_by_itself_has_the_mean():
    scored = np.arange(L) >= 3
    size = {start: int(scored[block].sum()) for start, block in BLOCKS.items()}
    counts = []
    for number, pair in itertools.product(range(30), range(2)):
        drawn = [antithetic_count_mask(3, number, 2 * pair + half, 4, STARTS, scored) for half in (0, 1)]
        assert ((drawn[0][0] | drawn[1][0]) == scored).all()
        for masked, weights in drawn:
            for start, block in BLOCKS.items():  # no variance where the mask changes no cross entropy
                assert weights[block].sum() == pytest.approx(size[start]) and masked[block].any()
        both = [int(masked[BLOCKS[8]].sum()) for masked, _ in drawn]
        assert sum(both) == 5
        counts.append(tuple(both))
    assert set(counts) == {(1, 4), (2, 3), (3, 2), (4, 1)}
    second = np.mean([antithetic_count_mask(5, n, 1, 2, STARTS, scored)[1] for n in range(3000)], axis=0)
    assert np.abs(second - scored).max() < 0.15


def test_every_position_is_masked_equally_often():
    masked = np.mean([exact_count_mask(5, s, 0, 1, np.zeros(8, int))[0] for s in range(4000)], axis=0)
    assert np.abs(masked - 9 / 16).max() < 4 * math.sqrt(0.25 / 4000)


def test_masks_depend_on_seed_sequence_and_draw_alone():
    def drawn(seed: int, sequence: int, draw: int) -> bytes:
        return exact_count_mask(seed, sequence, draw, 4, STARTS)[0].tobytes()

    keys = list(itertools.product((1, 2), range(3), range(4)))
    first = {key: drawn(*key) for key in keys}
    assert {key: drawn(*key) for key in reversed(keys)} == first
    assert len(set(first.values())) == len(keys)


def test_prompts_are_neither_masked_nor_counted():
    supervised = np.random.default_rng(3).random(L) < 0.6
    found = []
    for sequence in range(2000):
        masked, weights = exact_count_mask(4, sequence, 0, 1, STARTS, supervised)
        assert not (masked & ~supervised).any()
        found.append(weights)
    # E[m/k 1(i in M)] = E_k[m/k k/m] = 1 for every scored position, whatever its block holds besides.
    mean, error = np.mean(found, axis=0), np.std(found, axis=0) / math.sqrt(len(found))
    assert (np.abs(mean - supervised) <= 4.5 * error).all()
