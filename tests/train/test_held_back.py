from __future__ import annotations

import numpy as np
import pytest

from prism_trt.config import TrainConfig
from prism_trt.errors import PrismError
from prism_trt.train.held_back import hold_back

ROOTS = np.full(20, 9)
ALL = np.ones(20, dtype=bool)


def first(count: int) -> np.ndarray:
    return np.arange(20) < count


def test_held_back_answers_are_greedy_and_not_trained_on() -> None:
    held_back, training = hold_back(ROOTS, first(12), TrainConfig(hold_back=5))
    assert len(held_back) == 5 and max(held_back) < 12
    assert sorted([*held_back, *training]) == list(range(20))
    again, other = (hold_back(ROOTS, first(12), TrainConfig(hold_back=5, seed=seed))[0] for seed in (0, 7))
    assert np.array_equal(held_back, again) and not np.array_equal(held_back, other)


@pytest.mark.parametrize(
    ("greedy", "count", "message"),
    [
        (ALL, 64, "--hold-back 64 would hold back 20 of 20 answers"),
        (ALL, 11, "11 of 20 answers, more than half"),
        (first(3), 3, "all 3 greedy answers, so only sampled ones are left"),
        (first(3), 64, "all 3 greedy answers"),
    ],
)
def test_holding_back_too_much_is_refused(greedy: np.ndarray, count: int, message: str) -> None:
    with pytest.raises(PrismError, match=message):
        hold_back(ROOTS, greedy, TrainConfig(hold_back=count))


def test_half_of_the_answers_and_none_at_all_may_be_held_back() -> None:
    assert len(hold_back(ROOTS, ALL, TrainConfig(hold_back=10))[0]) == 10
    assert len(hold_back(ROOTS, first(0), TrainConfig(hold_back=10))[0]) == 0
    assert len(hold_back(ROOTS, ALL, TrainConfig(hold_back=0))[0]) == 0


@pytest.mark.parametrize(("roots", "greedy"), [(np.full(20, 4), ALL), (ROOTS, first(0))])
def test_a_step_map_that_cannot_be_measured_is_refused(roots: np.ndarray, greedy: np.ndarray) -> None:
    with pytest.raises(PrismError, match="measures 5 draft steps, but no answer held back has so many tokens"):
        hold_back(roots, greedy, TrainConfig(hold_back=5, step_map="auto"))
    hold_back(roots, greedy, TrainConfig(hold_back=5))


def test_answers_without_a_row_to_learn_from_are_refused() -> None:
    with pytest.raises(PrismError, match="no answer has two tokens"):
        hold_back(np.zeros(20, dtype=int), ALL, TrainConfig())
