"""Lengths of packed documents, for checks and benchmarks that need no text."""

from __future__ import annotations

import numpy as np


def log_normal_documents(mu: float, sigma: float, seed: int, length: int) -> list[int]:
    """cu_seqlens of documents whose log-lengths are N(mu, sigma^2), the last one cut at `length` tokens."""
    random, ends = np.random.default_rng(seed), [0]
    while ends[-1] < length:
        ends.append(min(length, ends[-1] + max(1, int(random.lognormal(mu, sigma)))))
    return ends
