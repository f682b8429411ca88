"""Sequences to bins of a fixed number of rows."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def pack_lengths(lengths: np.ndarray, rows: int, seed: int | tuple[int, ...]) -> list[np.ndarray]:
    """Bins of sequences that have at most `rows` rows together, each sequence in one of them.

    Best fit over a random permutation: each sequence goes into the fullest bin that still holds it. Unlike first fit
    by decreasing length it does not put sequences of like length together, and each seed gives other bins.

    Args:
        lengths: [n] int, rows of each sequence.
        seed: decides the permutation; the same seed gives the same bins.

    Returns:
        Indices of the sequences of each bin, in random order of bins.

    Raises:
        ValueError: a sequence is longer than a bin.
    """
    if len(lengths) and int(lengths.max()) > rows:
        raise ValueError(f"a sequence of {int(lengths.max())} rows does not fit into a bin of {rows}")
    random = np.random.default_rng(seed)
    bins: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (rows left, bin), ascending; full bins are not in it
    shortest = int(lengths.min()) if len(lengths) else 0
    for index in random.permutation(len(lengths)).tolist():
        length = int(lengths[index])
        place = bisect_left(space, (length, -1))
        if place < len(space):
            left, number = space.pop(place)
        else:
            left, number = rows, len(bins)
            bins.append([])
        bins[number].append(index)
        if left - length >= shortest:
            insort(space, (left - length, number))
    return [np.array(bins[number]) for number in random.permutation(len(bins))]
