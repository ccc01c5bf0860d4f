"""Sequences cut to a random length, so that a model with full attention learns those that decoding has.

LLaDA (arXiv 2502.09992) cuts 1% of its pretraining sequences to a length uniform on 1..L. A batch keeps its
shape here: what is cut off stays as documents that the others do not see, and is neither masked nor counted.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llada_megatron.data.packed import PackedSample
from llada_megatron.parallel.random import Purpose, generator


def at_random_length(sample: PackedSample, seed: int, sequence: int, share: float) -> PackedSample:
    """The sample at a global index, for a `share` of all indices only its first n tokens, n uniform on 1..L.

    A function of (seed, sequence). Conversations, whose answers alone are supervised, stay whole.
    """
    if not share or sample.supervised is not None:
        return sample
    draws, L = generator(seed, Purpose.RANDOM_LENGTH, sequence), len(sample.tokens)
    if draws.random() >= share:
        return sample
    return _cut(sample, int(draws.integers(1, L + 1)))


def _cut(sample: PackedSample, length: int) -> PackedSample:
    starts, ids = sample.cu_seqlens, sample.document_ids
    place = int(np.searchsorted(starts, length))
    if starts[place] != length:
        starts = np.insert(starts, place, length)
        ids = None if ids is None else np.insert(ids, place, ids[place - 1])
    is_kept = np.arange(len(sample.tokens)) < length
    return replace(sample, cu_seqlens=starts, document_ids=ids, supervised=is_kept)
