"""Which corpus a sample of a blend comes from: one period of a fixed order, for ever again.

The order inside the period is megatron-core's (`build_blending_indices`): each sample goes to the corpus that
is furthest behind its weight, so every stretch of samples holds the weights' shares to within about one
sample. A corpus is read from its beginning on, without a gap: sample i, the r-th of period p, is sequence
p * (its samples in a period) + (its samples among the first r) of its corpus.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from megatron.core.datasets import helpers
from megatron.core.datasets.utils import normalize

from llada_megatron.config.errors import BadInput

PERIOD = 2**20
"""Samples; part of the identity of every blend."""
MAX_CORPORA = 2**15 - 2
"""Their numbers are int16."""


class Blend:
    """`blend[i]`: the number of a corpus and the index of its sequence, for any i >= 0."""

    def __init__(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Raises BadInput for a corpus whose weight is too small for one sample of a period."""
        if len(names) > MAX_CORPORA:
            raise BadInput(
                f"data.path has {len(names)} entries, more than {MAX_CORPORA}: name the shards of a domain by"
                " their folder or a pattern, which makes them one corpus."
            )
        shares = normalize([*weights])
        if min(shares) * PERIOD < 1:
            number = int(numpy.argmin(shares))
            raise BadInput(
                f"{names[number]} has a share of {shares[number]:.1e} of the blend, less than one of"
                f" {PERIOD:,} samples: give it a larger weight in data.weights, make it one corpus with"
                " others by a folder or a pattern, or leave it out of data.path."
            )
        self._corpus = numpy.zeros(PERIOD, numpy.int16)
        self._place = numpy.zeros(PERIOD, numpy.int64)
        helpers.build_blending_indices(self._corpus, self._place, shares, len(names), PERIOD, False)
        self._samples = numpy.bincount(self._corpus, minlength=len(names))

    def __getitem__(self, index: int) -> tuple[int, int]:
        period, place = divmod(index, PERIOD)
        corpus = int(self._corpus[place])
        return corpus, period * int(self._samples[corpus]) + int(self._place[place])

    def before(self, index: int) -> list[int]:
        """How many of the first `index` samples each corpus gives."""
        periods, place = divmod(index, PERIOD)
        among = numpy.bincount(self._corpus[:place], minlength=len(self._samples))
        return [int(count) for count in periods * self._samples + among]
