from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_trt.bench.statistics import (
    Array,
    Draws,
    bounds,
    divide,
    draw_questions,
    draw_seeds,
    mean_ratio,
    pooled_ratio,
    set_mean_ratio,
    step_acceptance,
)


def draws(questions: list[str], seeds: int = 1, samples: int = 300, seed: int = 0) -> Draws:
    return Draws(draw_questions(questions, samples, seed), draw_seeds(seeds, samples, (seed, 1)))


def counts(*seeds: list[float]) -> Array:
    return np.array(seeds, dtype=float)


def test_pooled_and_mean_ratios_weigh_questions_differently() -> None:
    tokens, passes, drawn = counts([90, 4, 8]), counts([30, 4, 2]), draws(["a", "a", "b"])
    assert pooled_ratio(tokens, passes, drawn)[0] == pytest.approx(102 / 36)
    assert mean_ratio(tokens, passes, drawn)[0] == pytest.approx((3 + 1 + 4) / 3)
    assert set_mean_ratio(tokens, passes, ["a", "a", "b"], drawn)[0] == pytest.approx((94 / 34 + 4) / 2)


def test_training_seeds_are_pooled() -> None:
    tokens, passes, drawn = counts([90, 4], [60, 2]), counts([30, 4], [10, 1]), draws(["a", "a"], seeds=2)
    assert pooled_ratio(tokens, passes, drawn)[0] == pytest.approx(156 / 45)
    assert mean_ratio(tokens, passes, drawn)[0] == pytest.approx((3 + 1 + 6 + 2) / 4)


def test_questions_without_a_pass_are_left_out_of_the_mean() -> None:
    tokens, passes, drawn = counts([6, 0]), counts([2, 0]), draws(["a", "a"])
    assert bounds(mean_ratio(tokens, passes, drawn)) == (3, 3, 3)
    assert pooled_ratio(tokens, passes, drawn)[0] == 3
    assert bounds(mean_ratio(0 * tokens, 0 * passes, drawn)) is None
    assert bounds(pooled_ratio(0 * tokens, 0 * passes, drawn)) is None


def test_what_was_not_timed_has_no_rate() -> None:
    assert bounds(pooled_ratio(counts([6, 3]), counts([np.nan, np.nan]), draws(["a", "a"]))) is None


def test_questions_are_drawn_within_their_set_and_reproducibly() -> None:
    names = ["a", "b", "a", "b", "b"]
    drawn = draw_questions(names, 500, seed=7)
    assert np.array_equal(drawn, draw_questions(names, 500, seed=7))
    assert not np.array_equal(drawn, draw_questions(names, 500, seed=8))
    assert (drawn[0] == 1).all()
    assert (drawn[:, [0, 2]].sum(axis=1) == 2).all()
    assert (drawn[:, [1, 3, 4]].sum(axis=1) == 3).all()
    assert len({tuple(row) for row in drawn[:, [0, 2]]}) == 3


def test_equal_questions_have_an_interval_of_no_width() -> None:
    assert bounds(pooled_ratio(counts([12] * 5), counts([4] * 5), draws(["a"] * 5))) == (3, 3, 3)


def test_ratios_pair_the_questions() -> None:
    """Questions that are hard for both methods alike leave the ratio as it is."""
    tokens, drawn = counts([100] * 6), draws(["a"] * 6)
    slow = counts([1, 2, 4, 8, 16, 32])
    ratio = divide(pooled_ratio(tokens, slow, drawn), pooled_ratio(tokens, 2 * slow, drawn))
    assert bounds(ratio) == pytest.approx((2, 2, 2))


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        passes = generator.integers(20, 40, size=(1, 60)).astype(float)
        tokens = passes * generator.normal(3.0, 0.5, size=(1, 60))
        found = bounds(pooled_ratio(tokens, passes, draws(["a"] * 60, samples=400, seed=trial)))
        assert found is not None
        hits += found[1] <= 3.0 <= found[2]
    assert 0.88 <= hits / 200 <= 0.99


def test_interval_covers_what_other_training_seeds_would_give() -> None:
    """Drawing questions alone would miss the spread of the seeds, which is the larger part here."""
    generator = np.random.default_rng(0)
    hits = {"both": 0, "questions": 0}
    for trial in range(200):
        effect = generator.normal(0.0, 0.3, size=(8, 1)) + generator.normal(0.0, 0.5, size=(1, 40))
        passes = np.full((8, 40), 30.0)
        both = draws(["a"] * 40, seeds=8, samples=400, seed=trial)
        for name, drawn in {"both": both, "questions": Draws(both.questions, np.ones_like(both.seeds))}.items():
            found = bounds(pooled_ratio(passes * (3.0 + effect), passes, drawn))
            assert found is not None
            hits[name] += found[1] <= 3.0 <= found[2]
    assert 0.85 <= hits["both"] / 200 <= 0.99
    assert hits["questions"] / 200 < 0.8


def test_interval_is_the_central_95_percent() -> None:
    assert bounds(np.array([500.0, *range(1001)])) == pytest.approx((500, 25, 975))
    assert bounds(np.array([np.nan, 1.0])) is None
    assert bounds(np.array([1.0, np.nan, np.inf])) is None


@given(st.lists(st.lists(st.integers(0, 5), max_size=5), max_size=6))
def test_step_acceptance_counts_passes_like_hass(counts: list[list[int]]) -> None:
    accepted = [a for row in counts for a, passes in enumerate(row) for _ in range(passes)]
    for k, share in enumerate(step_acceptance(counts, 4)):
        reached = sum(a >= k for a in accepted)
        expected = sum(a >= k + 1 for a in accepted) / reached if reached else None
        assert share == expected
