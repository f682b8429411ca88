from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_trt.bench.statistics import (
    interval,
    mean_ratio,
    mean_ratio_interval,
    pooled_ratio,
    pooled_ratio_interval,
    resample,
    speedup,
    speedup_interval,
    step_acceptance,
)


def test_pooled_and_mean_ratios_weigh_questions_differently() -> None:
    tokens, passes = np.array([90.0, 4.0]), np.array([30.0, 4.0])
    assert pooled_ratio(tokens, passes) == pytest.approx(94 / 34)
    assert mean_ratio(tokens, passes) == pytest.approx((3 + 1) / 2)


def test_questions_without_a_pass_are_left_out_of_the_mean() -> None:
    tokens, passes = np.array([6.0, 0.0]), np.array([2.0, 0.0])
    assert mean_ratio(tokens, passes) == 3
    assert pooled_ratio(tokens, passes) == 3
    nothing = np.zeros(2)
    assert mean_ratio(nothing, nothing) is None
    assert pooled_ratio(nothing, nothing) is None
    drawn = resample(["a", "a"], 200, 0)
    assert mean_ratio_interval(tokens, passes, drawn) == (3, 3)


def test_speedup_is_a_ratio_of_pooled_rates() -> None:
    tokens = np.array([10.0, 30.0])
    assert speedup(tokens, np.array([1.0, 3.0]), tokens, np.array([4.0, 4.0])) == pytest.approx(10 / 5)


def test_resampling_is_deterministic_and_stays_within_sets() -> None:
    names = ["a", "b", "a", "b", "b"]
    drawn = resample(names, 500, seed=7)
    assert np.array_equal(drawn, resample(names, 500, seed=7))
    assert not np.array_equal(drawn, resample(names, 500, seed=8))
    assert all(names[drawn[s, q]] == names[q] for s in range(500) for q in range(5))
    assert len({tuple(row) for row in drawn[:, [0, 2]]}) == 4


def test_equal_questions_have_an_interval_of_no_width() -> None:
    tokens, passes, drawn = np.full(5, 12.0), np.full(5, 4.0), resample(["a"] * 5, 100, 0)
    assert pooled_ratio_interval(tokens, passes, drawn) == (3, 3)


def test_speedup_interval_pairs_the_modes() -> None:
    """A machine that slows down for both modes alike leaves the ratio as it is."""
    tokens = np.full(6, 100.0)
    slow = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    low, high = speedup_interval(tokens, slow, tokens, 2.0 * slow, resample(["a"] * 6, 300, 1)) or (0, 0)
    assert (low, high) == pytest.approx((2, 2))


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        passes = generator.integers(20, 40, size=60).astype(float)
        tokens = passes * generator.normal(3.0, 0.5, size=60)
        low, high = pooled_ratio_interval(tokens, passes, resample(["a"] * 60, 400, trial)) or (0, 0)
        hits += low <= 3.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_interval_is_the_central_95_percent() -> None:
    assert interval(np.arange(1001.0)) == pytest.approx((25, 975))
    assert interval(np.array([np.nan, np.inf])) is None


@given(st.lists(st.lists(st.integers(0, 5), max_size=5), max_size=6))
def test_step_acceptance_counts_passes_like_hass(counts: list[list[int]]) -> None:
    accepted = [a for row in counts for a, passes in enumerate(row) for _ in range(passes)]
    for k, share in enumerate(step_acceptance(counts, 4)):
        reached = sum(a >= k for a in accepted)
        expected = sum(a >= k + 1 for a in accepted) / reached if reached else None
        assert share == expected
