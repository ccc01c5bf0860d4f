"""Orders obeyed one token at a time, as the decoding rule and SGLang do; and pairs to try them on."""

import numpy as np

MASK, DELETE, SPLIT = 5000, 5001, 5002


def obeyed(draft: list[int], labels: list[int]) -> list[int]:
    """SGLang's joint_threshold_indel: DELETE drops the position, SPLIT at i yields [MASK, old token]; then
    masks up to the block's length, or what is beyond it falls off."""
    said: list[int] = []
    for old, new in zip(draft, labels, strict=True):
        if new == SPLIT:
            said += [MASK, old]
        elif new != DELETE:
            said.append(new)
    return (said + [MASK] * len(draft))[: len(draft)]


def obeyed_together(draft_Km: np.ndarray, labels_Km: np.ndarray) -> np.ndarray:
    """The same of many blocks at once, which a million need."""
    K, m = draft_Km.shape
    own = np.where(labels_Km == SPLIT, draft_Km, labels_Km)
    said_Km2 = np.stack([np.full_like(own, MASK), own], axis=2).reshape(K, 2 * m)
    stays_Km2 = np.stack([labels_Km == SPLIT, labels_Km != DELETE], axis=2).reshape(K, 2 * m)
    at = stays_Km2.cumsum(axis=1) - 1
    stays_Km2 &= at < m
    result = np.full_like(draft_Km, MASK)
    result[np.nonzero(stays_Km2)[0], at[stays_Km2]] = said_Km2[stays_Km2]
    return result


def pairs(count: int, m: int, words: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Drafts and targets [count, m] that have nothing in common, with some masks in the drafts."""
    random = np.random.default_rng((seed, m, words))
    target, draft = random.integers(0, words, (2, count, m))
    return np.where(random.random((count, m)) < random.random((count, 1)) / 2, MASK, draft), target
