"""A run of a flattened parameter is a few boxes of it."""

import itertools
import math

import numpy as np
import pytest

from llada_megatron.checkpoint.moments import boxes


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4), (1, 2, 1, 3)])
def test_the_boxes_of_a_run_are_its_elements_in_order_and_as_few_as_possible(shape):
    grid = np.arange(math.prod(shape)).reshape(shape)
    for start, stop in itertools.combinations(range(grid.size + 1), 2):
        found = list(boxes(shape, start, stop))
        elements = [
            grid[tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))].ravel()
            for offset, size in found
        ]
        assert np.concatenate(elements).tolist() == list(range(start, stop))
        assert len(found) <= 2 * len(shape) - 1


def test_whole_rows_are_one_box():
    assert list(boxes((5, 8), 8, 32)) == [((1, 0), (3, 8))]
    assert list(boxes((2, 5, 8), 0, 80)) == [((0, 0, 0), (2, 5, 8))]
