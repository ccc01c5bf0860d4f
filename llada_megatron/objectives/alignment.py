"""Levenshtein labels: what to do at each position of a draft so that it becomes its target; numpy alone.

Draft and target of a block have the same number m of tokens. Their longest common subsequence (LLaDA2.2),
of several one with the fewest orders, gives pairs of equal tokens; between two neighbouring pairs lie p
tokens of the draft and q of the target:

    KEEP        a paired token, with p >= q before it           label: the token
    SPLIT       a paired token, with p < q before it            label: the split token
    SUBSTITUTE  the u-th token between pairs, u < q             label: the target's u-th token between them
    DELETE      the u-th token between pairs, u >= q            label: the delete token

A mask is never paired: what it is filled with is a SUBSTITUTE. Obeyed from left to right, DELETE drops a
position, SPLIT puts a mask before it, and what is missing at the end are masks; there is never too much, for
as many tokens are surplus as are missing. Where several tokens are missing a SPLIT makes room for one: labels
are obeyed, and made anew, until the draft is the target (docs/levenshtein.md).

Legend: K blocks, m tokens of the longest.
"""

from __future__ import annotations

import numpy as np


def edit_labels(draft_Km: np.ndarray, target_Km: np.ndarray, delete_id: int, split_id: int) -> np.ndarray:
    """The labels int64 [K, m] of drafts.

    draft, target: int64 [K, m]; behind the tokens of a shorter block both hold `ends(m)`, whose labels are to
    be left out. Neither may hold the delete or the split token, and the target no mask.
    """
    pair_Km = paired_with(draft_Km, target_Km)
    m = draft_Km.shape[1]
    place = np.arange(m)
    is_pair = pair_Km >= 0
    before = np.maximum.accumulate(np.where(is_pair, place, -1), axis=1)  # the last pair up to here
    earlier = np.concatenate([np.full_like(before[:, :1], -1), before[:, :-1]], axis=1)  # before here
    paired = np.maximum.accumulate(pair_Km, axis=1)
    paired_earlier = np.concatenate([np.full_like(paired[:, :1], -1), paired[:, :-1]], axis=1)
    following = np.where(is_pair, pair_Km, m)
    following = np.minimum.accumulate(following[:, ::-1], axis=1)[:, ::-1]
    surplus = place - earlier - 1  # p up to here, so it is u of a token that is not paired
    missing = following - paired_earlier - 1  # q
    substitute = np.take_along_axis(target_Km, np.minimum(paired_earlier + 1 + surplus, m - 1), axis=1)
    labels_of_pairs = np.where(surplus < missing, split_id, draft_Km)
    return np.where(is_pair, labels_of_pairs, np.where(surplus < missing, substitute, delete_id))


def paired_with(draft_Km: np.ndarray, target_Km: np.ndarray) -> np.ndarray:
    """For each token of the draft the place of its equal in the target, int64 [K, m], -1 for none.

    Of the longest common subsequences one that leaves the fewest tokens to delete and to make room for, so
    that a mask is filled where it stands though its neighbours are alike; of several the first one.
    """
    K, m = draft_Km.shape
    equal_Kmm = draft_Km[:, :, None] == target_Km[:, None, :]
    of_pair = 2 * m + 1  # more than all that is deleted and missing
    place = np.arange(m + 1, dtype=np.int32)
    worth = np.zeros((K, m + 1, m + 1), dtype=np.int32)  # of what is left from (i, j) on
    worth[:, m] = place - m
    for row in range(m - 1, -1, -1):
        below = worth[:, row + 1] - 1
        below[:, :-1] = np.maximum(below[:, :-1], worth[:, row + 1, 1:] + of_pair * equal_Kmm[:, row])
        # worth[i, j] = max over j' >= j of below[j'] - (j' - j): so many are missing before what follows
        worth[:, row] = np.maximum.accumulate((below - place)[:, ::-1], axis=1)[:, ::-1] + place
    pair_Km = np.full((K, m), -1, dtype=np.int64)
    block, i, j = np.arange(K), np.zeros(K, dtype=np.int64), np.zeros(K, dtype=np.int64)
    for _ in range(2 * m):
        inside = (i < m) & (j < m)
        at = block, np.minimum(i, m - 1), np.minimum(j, m - 1)
        here, both = worth[at], worth[at[0], at[1] + 1, at[2] + 1]
        is_pair = inside & equal_Kmm[at] & (here == both + of_pair)
        pair_Km[block[is_pair], i[is_pair]] = j[is_pair]
        passes_both = is_pair | (here == both)
        skips_draft = ~passes_both & (here == worth[at[0], at[1] + 1, at[2]] - 1)
        i += inside & (passes_both | skips_draft)
        j += inside & ~skips_draft
    return pair_Km


def ends(m: int) -> np.ndarray:
    """int64 [m]: what fills the places behind a shorter block, other than any token and alike in both."""
    return -1 - np.arange(m)
