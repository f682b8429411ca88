from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from prism_trt.config import TrainConfig
from prism_trt.train.stages import DataOrder, learning_rate, stages


def test_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    config = TrainConfig(one_step_updates=100, one_step_lr=1.0, warmup=0.1, final_lr=0.2)
    stage = stages(config)[0]
    rates = [learning_rate(update, stage, config) for update in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[54] == pytest.approx(0.6, abs=0.01)
    assert rates[99] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(rates[9:]))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"log_every": 7}, 3),
        ({"tuning_updates": 9}, 2),
        ({"modules": 3}, 2),
        ({"alignment_lr": 0.1}, 1),
        ({"one_step_updates": 9}, 0),
        ({"seed": 9}, 0),
    ],
)
def test_signatures_change_from_the_first_stage_that_an_option_touches(change: dict[str, float], same: int) -> None:
    before = [stage.signature for stage in stages(TrainConfig())]
    after = [stage.signature for stage in stages(TrainConfig(**change))]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True] * same + [False] * (3 - same)


def test_every_epoch_visits_every_sequence_once_in_full_packs() -> None:
    roots = np.random.default_rng(0).integers(1, 40, size=500)
    order = DataOrder(roots, rows_per_update=256, seed=3, stage=1)
    packs = [order.at(update) for update in range(2 * int(roots.sum()) // 256 + 4)]
    seen = np.concatenate(packs)
    assert sorted(seen[:500]) == sorted(seen[500:1000]) == list(range(500))
    assert not np.array_equal(seen[:500], seen[500:1000])
    rows = [int(roots[pack].sum()) for pack in packs]
    assert max(rows) <= 256 and np.mean(rows) > 0.97 * 256


def test_order_depends_on_seed_stage_and_update_only() -> None:
    roots = np.full(100, 10)
    forward = DataOrder(roots, 50, seed=1, stage=0)
    seen = [forward.at(update) for update in range(50)]
    fresh = DataOrder(roots, 50, seed=1, stage=0)
    for update in (49, 3, 20):
        assert np.array_equal(fresh.at(update), seen[update])
    assert not np.array_equal(DataOrder(roots, 50, seed=1, stage=1).at(0), seen[0])
    assert not np.array_equal(DataOrder(roots, 50, seed=2, stage=0).at(0), seen[0])


def test_a_sequence_longer_than_an_update_is_one() -> None:
    roots = np.array([1000, 1, 1, 1])
    order = DataOrder(roots, 100, seed=0, stage=0)
    packs = [sorted(order.at(update)) for update in range(30)]
    assert all(pack in ([0], [1, 2, 3]) for pack in packs)
    assert packs.count([0]) == 15
