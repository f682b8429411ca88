from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prism_trt.speculative.prefill import group, share

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=8)


@given(LENGTHS, st.integers(1, 80))
def test_the_budget_is_used_up_but_not_exceeded(remaining: list[int], budget: int) -> None:
    shares = share(remaining, budget)
    assert sum(shares) == min(budget, sum(remaining))
    assert all(0 <= given <= wanted for given, wanted in zip(shares, remaining, strict=True))
    assert shares[0] >= min(remaining[0], budget / 2)


def test_short_prompts_do_not_wait_behind_a_long_one() -> None:
    assert share([1000, 300, 20, 30], 128) == [64, 14, 20, 30]
    assert share([1000, 20], 128) == [108, 20]
    assert share([10, 1000, 1000], 128) == [10, 118, 0]


@given(LENGTHS, st.integers(60, 200))
def test_calls_are_within_the_limit_and_at_most_half_padding(counts: list[int], limit: int) -> None:
    counts = [*counts, 0]
    calls = group(counts, limit)
    assert sorted(i for call in calls for i in call) == list(range(len(counts) - 1))
    for call in calls:
        padded = len(call) * max(counts[i] for i in call)
        assert padded <= limit
        assert padded <= 2 * sum(counts[i] for i in call)


def test_equal_prompts_share_a_call() -> None:
    assert group([5, 5, 40, 5], 64) == [[2], [0, 1, 3]]
