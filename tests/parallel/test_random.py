import itertools

import numpy as np
import pytest

from llada_megatron.parallel.random import Purpose, generator, torch_seed


def test_a_draw_is_a_function_of_seed_purpose_and_index():
    keys = list(itertools.product((0, 1, 2**32 - 1), Purpose, (0, 1, 10**9)))
    first = {key: generator(*key).random(8).tobytes() for key in keys}
    assert {key: generator(*key).random(8).tobytes() for key in reversed(keys)} == first
    assert len(set(first.values())) == len(keys)


def test_a_long_draw_never_reaches_the_numbers_of_the_next_index():
    long = generator(1, Purpose.MASK, 0).integers(2**63, size=200_000)
    following = generator(1, Purpose.MASK, 1).integers(2**63, size=200_000)
    assert not np.intersect1d(long, following).size


def test_neighbouring_indices_are_uncorrelated():
    draws = np.stack([generator(1, Purpose.MASK, index).random(64) for index in range(4000)])
    correlation = np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]
    assert abs(correlation) < 4 / np.sqrt(draws[1:].size)
    assert abs(draws.mean() - 0.5) < 4 / np.sqrt(12 * draws.size)


def test_the_stream_is_that_of_philox_with_the_documented_key_and_counter():
    bits = np.random.Philox(key=[7, int(Purpose.MASK_RATE)], counter=[0, 0, 0, 5])
    assert generator(7, Purpose.MASK_RATE, 5).random() == np.random.Generator(bits).random()


def test_the_values_of_purposes_are_part_of_every_run():
    assert {purpose.name: purpose.value for purpose in list(Purpose)[:5]} == {
        "MASK_RATE": 1,
        "MASK": 2,
        "EMBEDDING_NOISE": 3,
        "EVALUATION_COUNT": 4,
        "EVALUATION_MASK": 5,
    }


@pytest.mark.parametrize("index", [0, 1, 2**40])
def test_torch_seeds_fit_a_torch_generator(index):
    seed = torch_seed(2**32 - 1, Purpose.EMBEDDING_NOISE, index)
    assert 0 <= seed < 2**63
    assert seed == torch_seed(2**32 - 1, Purpose.EMBEDDING_NOISE, index)
