from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_trt.data.packing import pack_lengths


@given(lengths=st.lists(st.integers(0, 50), max_size=60), rows=st.integers(50, 120), seed=st.integers(0, 9))
def test_bins_hold_every_sequence_once_and_no_two_could_be_one(lengths: list[int], rows: int, seed: int) -> None:
    bins = pack_lengths(np.array(lengths, dtype=np.int64), rows, seed)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in members) for members in bins]
    assert all(total <= rows for total in sums)
    assert all(left + right > rows for left, right in combinations(sums, 2))


def test_the_seed_decides_the_bins() -> None:
    lengths = np.random.default_rng(0).integers(20, 257, size=500)

    def members(seed: tuple[int, ...]) -> list[list[int]]:
        return [bin.tolist() for bin in pack_lengths(lengths, 2048, seed)]

    assert members((0, 1)) == members((0, 1))
    assert members((0, 1)) != members((0, 2))
    assert lengths.sum() / (2048 * len(members((0, 1)))) > 0.95


def test_a_sequence_longer_than_a_bin_is_refused() -> None:
    with pytest.raises(ValueError, match="51 rows does not fit into a bin of 50"):
        pack_lengths(np.array([3, 51]), 50, 0)
