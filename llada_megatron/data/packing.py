"""Whole conversations into sequences of L, none of them cut: best fit, decreasing.

Sorted by length, the longest first, each goes into the sequence with the least room that still holds it, a
new one if none does. With many more conversations than sequences little room is left over: what remains is
filled by the short ones, which come last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Which conversations lie in which sequence: those of sequence s are items[starts[s] : starts[s + 1]]."""

    items: Integers
    """int64 [conversations], as indices into the lengths that were packed."""
    starts: Integers
    """int64 [sequences + 1]."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, sequence: int) -> Integers:
        return self.items[self.starts[sequence] : self.starts[sequence + 1]]


def permutation(seed: int, epoch: int, count: int, window: int = 0) -> Integers:
    """An order of `count` things, a function of (seed, epoch, window).

    Raw bits and a stable sort: numpy promises the same bits in every version, but not the same
    `Generator.permutation`.
    """
    key, counter = np.array([seed, epoch], dtype=np.uint64), np.array([0, 0, 0, window], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=counter).random_raw(count)
    return np.argsort(bits, kind="stable")


def quantised(lengths: Integers, quantum: int) -> Integers:
    """Lengths rounded up to multiples of `quantum` tokens."""
    return -(-lengths // quantum) * quantum


def best_fit(lengths: Integers, capacity: int, seed: int) -> Packing:
    """Pack conversations of these lengths, each from 1 to `capacity`, into sequences of `capacity`.

    A function of its arguments: equal lengths are taken in an order that the seed draws, so that neighbours
    in the file do not meet in a sequence. Linear in the conversations but for the sort: the room that is
    left in the open sequences is a set of numbers up to `capacity`, kept as the bits of one integer.
    """
    drawn = permutation(seed, 0, len(lengths))
    order = drawn[np.argsort(-lengths[drawn], kind="stable")]
    unit = int(np.gcd.reduce(np.append(lengths, capacity)))  # fewer bits
    sizes, room = (lengths[order] // unit).tolist(), capacity // unit
    sequence_of = np.empty(len(order), np.int64)
    open_sequences: list[list[int]] = [[] for _ in range(room + 1)]  # by the units that are left in them
    open_rooms = sequences = 0
    for place, size in enumerate(sizes):
        fitting = open_rooms >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            chosen = open_sequences[left].pop()
            if not open_sequences[left]:
                open_rooms &= ~(1 << left)
        else:
            left, chosen, sequences = room, sequences, sequences + 1
        sequence_of[place] = chosen
        if left > size:
            open_sequences[left - size].append(chosen)
            open_rooms |= 1 << (left - size)
    together = np.argsort(sequence_of, kind="stable")
    counts = np.bincount(sequence_of, minlength=sequences)
    return Packing(order[together], np.concatenate(([0], np.cumsum(counts))))
