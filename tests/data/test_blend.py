"""The order of a blend: weights in every stretch, each corpus without a gap, the same in every version."""

import numpy
import pytest
from megatron.core.datasets import helpers
from megatron.core.datasets.utils import normalize

from llada_megatron.config.errors import BadInput
from llada_megatron.data import blend
from llada_megatron.data.blend import PERIOD, Blend


def test_a_blend_goes_on_for_ever_and_reads_each_corpus_without_a_gap(monkeypatch):
    monkeypatch.setattr(blend, "PERIOD", 64)
    mixed = Blend(["a", "b", "c"], [5.0, 1.0, 2.5])
    seen = {number: [] for number in range(3)}
    for index in range(1000):
        number, place = mixed[index]
        seen[number].append(place)
    assert all(places == [*range(len(places))] for places in seen.values())
    for number, weight in enumerate([5.0, 1.0, 2.5]):
        assert abs(len(seen[number]) - 1000 * weight / 8.5) <= 1000 / 64 + 1
    order = [mixed[index][0] for index in range(64)]
    assert [mixed[64 * 10**9 + index][0] for index in range(64)] == order


def test_the_first_period_of_a_blend_is_the_order_of_earlier_versions():
    """A change of it breaks the resume of running trainings."""
    size = 4096
    corpus, place = numpy.zeros(size, numpy.int16), numpy.zeros(size, numpy.int64)
    helpers.build_blending_indices(corpus, place, normalize([3.0, 0.7, 1.1]), 3, size, False)
    mixed = Blend(["a", "b", "c"], [3.0, 0.7, 1.1])
    assert [mixed[index] for index in range(size)] == [*zip(corpus.tolist(), place.tolist(), strict=True)]
    assert PERIOD == 2**20


def test_a_weight_that_is_too_small_is_refused_by_name():
    with pytest.raises(BadInput, match=r"tiny has a share of 1\.0e-07 of the blend.*data\.weights"):
        Blend(["large", "tiny"], [1.0, 1e-7])
