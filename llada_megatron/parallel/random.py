"""Counter-based random numbers: a draw is a function of (run seed, purpose, index) and of nothing else.

Philox (Salmon et al., SC'11) is keyed by (seed, purpose) and its counter starts at the index, so that a
draw does not depend on rank, layout, micro-batch or on what was drawn before.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """Streams of the same run that must not share numbers; values are part of a run's identity."""

    MASK_RATE = 1
    MASK = 2
    EMBEDDING_NOISE = 3
    EVALUATION_COUNT = 4
    EVALUATION_MASK = 5
    EVALUATION_INFILL = 6
    PREFERENCE_COUNT = 7
    PREFERENCE_MASK = 8
    DECODING = 9
    CONTINUATION_COUNT = 10
    CONTINUATION_MASK = 11
    DRAFT = 12
    DECODING_ORDER = 13
    NOISE_GROUPS = 20
    WRONG_PLACE = 21
    WRONG_WORD = 22
    DRAFTED = 23
    PLANTED_PLACE = 24
    PLANTED_WORD = 25
    REMASKING = 26
    RANDOM_LENGTH = 27
    BOUNDARY = 28


def generator(
    seed: int, purpose: Purpose, index: int, position: int = 0, step: int = 0
) -> np.random.Generator:
    """The generator of sample `index` for one purpose, or of a position in it and a step."""
    bits = np.random.Philox(key=[seed, int(purpose)], counter=[0, step, position, index])
    return np.random.Generator(bits)


def torch_seed(seed: int, purpose: Purpose, index: int) -> int:
    """A 63-bit seed for a torch generator on any device."""
    return int(generator(seed, purpose, index).integers(2**63))
