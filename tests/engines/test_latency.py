"""What a latency table says of calls that were not measured, and how it is measured."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from prism_trt.build.latency import measure
from prism_trt.engines.latency import Grid, LatencyModel, LatencyTable, monotone
from prism_trt.engines.protocol import LogitsFor, TargetOutput, TokenBatch
from tests.speculative.bag_engine import BagEngine

times = st.floats(0.1, 100)


@given(values=arrays(float, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=times))
def test_smoothing_is_monotone_and_leaves_monotone_times_alone(values: np.ndarray) -> None:
    smooth = monotone(values)
    assert (np.diff(smooth, axis=0) >= 0).all() and (np.diff(smooth, axis=1) >= 0).all()
    assert (values.min() <= smooth).all() and (smooth <= values.max()).all()
    np.testing.assert_array_equal(monotone(smooth), smooth)


@given(
    cells=st.dictionaries(
        st.sampled_from([1, 2, 4, 8]), st.lists(times, min_size=1, max_size=5), min_size=1, max_size=4
    ),
    call=st.tuples(st.integers(1, 40), st.integers(1, 80)),
    more=st.tuples(st.integers(0, 9), st.integers(0, 30)),
)
@example(cells={2: [1.0], 4: [3.0]}, call=(1, 1), more=(0, 0))
@example(cells={2: [2.0], 1: [1.0, 1.0, 2.0]}, call=(1, 5), more=(1, 0))
@example(cells={2: [3.0, 1.0], 1: [1.0], 4: [1.0]}, call=(1, 1), more=(0, 0))
def test_a_larger_call_is_never_predicted_to_be_faster(
    cells: dict[int, list[float]], call: tuple[int, int], more: tuple[int, int]
) -> None:
    columns = (1, 2, 4, 8, 16)
    grid = Grid.of({line: dict(zip(columns, row, strict=False)) for line, row in cells.items()})
    larger = grid.at(call[0] + more[0], call[1] + more[1])
    assert 0 < grid.at(*call) <= larger * (1 + 1e-9)


def test_times_of_work_in_proportion_are_predicted_exactly() -> None:
    def milliseconds(requests: int, tokens: int) -> float:
        return 2.0 + 0.5 * requests * tokens

    sizes, requests = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16)
    table = LatencyTable(
        context=8,
        # As where a call's tokens are limited: large batches have been measured with few tokens each.
        forward={n: {t: milliseconds(n, t) for t in sizes if n * t <= 64} for n in requests},
        draft_round={
            n: {f"{w + 1}/{w}/{d}": 1.0 + d * milliseconds(n, w) for w in (1, 4) for d in (1, 5)} for n in requests
        },
        extend=0.25,
    )
    model = LatencyModel(LatencyTable.model_validate_json(table.model_dump_json()))
    for n, tokens in ((1, 1), (3, 5), (6, 20), (16, 16), (12, 3), (32, 2), (40, 4)):
        assert model.forward(n, tokens) == pytest.approx(milliseconds(n, tokens))
    for n, width, depth in ((1, 1, 1), (3, 2, 4), (16, 4, 8), (5, 6, 2)):
        assert model.draft_round(n, width, depth) == pytest.approx(1.0 + depth * milliseconds(n, width))
    assert model.catch_up(10) == 2.5


class SlowEngine(BagEngine):
    """Calls take a time of their own, by tokens."""

    def forward(self, batch: TokenBatch, logits_for: LogitsFor = "all") -> TargetOutput:
        output = super().forward(batch, logits_for)
        time.sleep(1e-4 * batch.tokens.numel())
        return output


def test_measurement_covers_the_limits_and_ends_in_time() -> None:
    engine = SlowEngine(0, slots=6, context=64, tokens_per_call=48)
    table = measure(engine, seconds=60.0)
    assert sorted(table.forward) == sorted(table.draft_round) == [1, 2, 4, 6]
    assert max(table.forward[1]) == 32 and max(table.forward[6]) == 8  # 16 are committed, and 48 fit a call
    assert all(ms >= 0.1 * n * tokens for n, times in table.forward.items() for tokens, ms in times.items())
    assert {"2/1/1", "2/1/5", "9/8/1", "9/8/5"} <= set(table.draft_round[6])

    short = measure(engine, seconds=0.0)
    assert sorted(short.forward) == sorted(short.draft_round) == [1]
    assert LatencyModel(short).forward(6, 8) > 0

    assert short.extend > 0

    engine.has_drafter = False
    plain = measure(engine, seconds=0.0)
    assert (plain.draft_round, plain.extend) == ({}, 0)
