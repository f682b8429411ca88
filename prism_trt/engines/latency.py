"""Measured times of an engine's calls, and what they say of calls that were not measured.

A grid has one line per number of requests and one column per size of a call (tokens of each request, or nodes that each
expands per draft step). More work never takes less time, so what noise makes of the measurements is smoothed to be
monotone along both axes before anything is interpolated.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prism_trt.config import StrictModel, TreeShape

Array = NDArray[np.float64]


class LatencyTable(StrictModel):
    """Milliseconds of calls on the machine that measured them, each the shortest of a few."""

    context: int
    """Committed K/V entries of each request during the measurement."""
    forward: dict[int, dict[int, float]]
    """Target pass by requests, then by tokens of each request."""
    draft_round: dict[int, dict[str, float]]
    """Whole draft round by requests, then by tree (SIZE/WIDTH/DEPTH): each width with two depths; empty without a
    drafter."""
    extend: float
    """Each of many tokens that the drafter is extended over; 0 without a drafter."""


@dataclass(frozen=True)
class Grid:
    """Milliseconds over two axes, non-decreasing along both."""

    lines: tuple[int, ...]
    """Numbers of requests, ascending."""
    columns: tuple[int, ...]
    """Ascending."""
    values: Array
    """[lines, columns]."""

    @classmethod
    def of(cls, cells: Mapping[int, Mapping[int, float]]) -> Grid:
        """The smoothed grid of measured `cells`, by line and column; each line holds at least its first column."""
        lines = tuple(sorted(cells))
        columns = tuple(sorted({column for cell in cells.values() for column in cell}))
        measured = np.array([[cells[line].get(column, np.nan) for column in columns] for line in lines])
        return cls(lines, columns, monotone(filled(columns, measured)))

    def at(self, line: float, column: float) -> float:
        """Bilinear interpolation.

        A call before the first line or column costs what it does there. Beyond the last column, the last two give the
        slope, which does not fall from line to line. Beyond the last line, a call is taken to cost what the last line's
        does with as much work in sum.
        """
        if line > self.lines[-1]:
            line, column = self.lines[-1], column * line / self.lines[-1]
        beyond = max(0.0, column - self.columns[-1])
        i, along = _place(self.lines, line)
        j, across = _place(self.columns, column - beyond)
        last = min(j + 1, len(self.columns) - 1)
        values = self.values[:, j] + across * (self.values[:, last] - self.values[:, j]) + beyond * self._slopes
        far = min(i + 1, len(self.lines) - 1)
        return float(values[i] + along * (values[far] - values[i]))

    @cached_property
    def _slopes(self) -> Array:
        """[lines] milliseconds of a further column's unit."""
        if len(self.columns) < 2:
            return np.zeros(len(self.lines))
        rise = (self.values[:, -1] - self.values[:, -2]) / (self.columns[-1] - self.columns[-2])
        return np.maximum.accumulate(rise)


class LatencyModel:
    """Predicted milliseconds of an engine's calls. Never falls when a call grows."""

    def __init__(self, table: LatencyTable) -> None:
        self._extend = table.extend
        self._forward = Grid.of(table.forward)
        self._first: Grid | None = None
        self._further: Grid | None = None
        if table.draft_round:
            self._first, self._further = _draft_grids(table.draft_round)

    def forward(self, requests: int, tokens: float) -> float:
        """Milliseconds of a target pass over so many tokens of each request."""
        return self._forward.at(requests, tokens)

    def draft_round(self, requests: int, width: int, depth: int) -> float:
        """Milliseconds of a draft round."""
        assert self._first is not None, "the engine has no drafter"
        return self._first.at(requests, width) + (depth - 1) * self.further_step(requests, width)

    def further_step(self, requests: int, width: int) -> float:
        """Milliseconds of one draft step after the first."""
        assert self._further is not None, "the engine has no drafter"
        return self._further.at(requests, width)

    def catch_up(self, tokens: int) -> float:
        """Milliseconds to extend the drafter over `tokens` committed tokens in large calls."""
        return self._extend * tokens


def filled(columns: Sequence[int], values: Array) -> Array:
    """`values` [lines, columns] with the unmeasured end (NaN) of each line extrapolated.

    A line continues with the slope of its last two points; a line of one point, with the previous line's increments;
    neither falls.
    """
    result = values.copy()
    for i, line in enumerate(result):
        for j in np.flatnonzero(np.isnan(line)):
            if j >= 2:
                slope = (line[j - 1] - line[j - 2]) / (columns[j - 1] - columns[j - 2])
                line[j] = line[j - 1] + max(0.0, slope) * (columns[j] - columns[j - 1])
            else:
                line[j] = line[j - 1] + (max(0.0, result[i - 1, j] - result[i - 1, j - 1]) if i else 0.0)
    return result


def monotone(values: Array) -> Array:
    """`values` [lines, columns] made non-decreasing along both axes: the mean of the tightest monotone bounds.

    Values that are monotone already stay as they are.
    """
    above = np.maximum.accumulate(np.maximum.accumulate(values, 0), 1)
    below = np.minimum.accumulate(np.minimum.accumulate(values[::-1, ::-1], 0), 1)[::-1, ::-1]
    bounded: Array = (above + below) / 2
    return bounded


def _draft_grids(rounds: Mapping[int, Mapping[str, float]]) -> tuple[Grid, Grid]:
    """Milliseconds of the first draft step and of each further one, by requests and width."""
    first: dict[int, dict[int, float]] = {}
    further: dict[int, dict[int, float]] = {}
    for requests, trees in rounds.items():
        times: dict[int, dict[int, float]] = {}
        for text, ms in trees.items():
            shape = TreeShape.parse(text)
            times.setdefault(shape.width, {})[shape.depth] = ms
        for width, by_depth in times.items():
            if len(by_depth) < 2:
                continue  # the measurement ended in between
            (shallow, low), (deep, high) = min(by_depth.items()), max(by_depth.items())
            step = max(0.0, (high - low) / (deep - shallow))
            first.setdefault(requests, {})[width] = low - (shallow - 1) * step
            further.setdefault(requests, {})[width] = step
    return Grid.of(first), Grid.of(further)


def _place(axis: Sequence[int], value: float) -> tuple[int, float]:
    """Index of the point of `axis` to go from, and how far to go to the next, in its distance."""
    if len(axis) == 1:
        return 0, 0.0
    index = min(max(bisect_right(axis, value) - 1, 0), len(axis) - 2)
    return index, max(0.0, (value - axis[index]) / (axis[index + 1] - axis[index]))
