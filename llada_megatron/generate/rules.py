"""Which masked positions of a block a forward fills: pure functions, named in `RULES`.

Legend: n masked positions of the block, in rising order; k of them accepted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Rule = Callable[[np.ndarray, int, float], np.ndarray]
"""(probability float [n] of each position's most probable token, how many this forward must fill at least,
threshold) -> int [k], indices of the accepted ones; k is at least min(need, n)."""


def above_threshold(probability_n: np.ndarray, need: int, threshold: float) -> np.ndarray:
    """All with p > threshold if those are enough, else the `need` most probable (LLaDA2.0, section 5.4)."""
    accepted_k = np.flatnonzero(probability_n > threshold)
    if len(accepted_k) >= need:
        return accepted_k
    return np.argsort(-probability_n, kind="stable")[:need]


RULES: dict[str, Rule] = {"threshold": above_threshold}
