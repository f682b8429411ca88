"""Acceptance length, throughput and their confidence intervals from per-question counts.

Acceptance length (AL) is committed tokens per verification pass of the target, the bonus token included. It is given
pooled (sum of tokens / sum of passes, as SGLang-based evaluations do) and as the mean over questions of per-question
ratios (as the torch evaluations of EAGLE, HASS and PRISM do).

Shape legend: S training seeds, Q questions, B bootstrap samples. Counts are float64 [S, Q]: every training seed of a
method answers every question. A figure is computed for all samples at once, [1 + B]; its entry 0 is the data as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.95


@dataclass(frozen=True)
class Draws:
    """How often each question and each training seed is in each sample; sample 0 has all of them once."""

    questions: Array
    """[1 + B, Q]."""
    seeds: Array
    """[1 + B, S]."""

    def total(self, counts: Array) -> Array:
        """[1 + B] sums of `counts` [S, Q]."""
        sums: Array = ((self.questions @ counts.T) * self.seeds).sum(axis=1)
        return sums

    def within(self, members: NDArray[np.bool_]) -> Draws:
        """The same draws without the questions outside `members` [Q]."""
        return Draws(self.questions * members, self.seeds)


def draw_questions(strata: Sequence[str], samples: int, seed: int) -> Array:
    """`Draws.questions`: questions drawn with replacement within their stratum (question set).

    Sets are a fixed part of the benchmark, so only the choice of questions within them is resampled. Methods that are
    compared share these draws, because they answer the same questions.
    """
    generator = np.random.default_rng(seed)
    names = np.asarray(strata)
    drawn = np.ones((1 + samples, len(names)))
    for name in dict.fromkeys(strata):
        members = np.flatnonzero(names == name)
        drawn[1:, members] = _occurrences(generator.integers(0, len(members), size=(samples, len(members))))
    return drawn


def draw_seeds(count: int, samples: int, seed: int | Sequence[int]) -> Array:
    """`Draws.seeds`: `count` training seeds drawn with replacement, apart from the questions.

    With few seeds the interval is too narrow: a bootstrap of S values has (S - 1) / S of their unbiased variance.
    """
    drawn = np.ones((1 + samples, count))
    drawn[1:] = _occurrences(np.random.default_rng(seed).integers(0, count, size=(samples, count)))
    return drawn


def _occurrences(picks: NDArray[np.int64]) -> Array:
    """How often each of 0..n-1 is in each row of `picks` [B, n]."""
    rows, columns = picks.shape
    flat = picks + columns * np.arange(rows)[:, None]
    return np.bincount(flat.ravel(), minlength=rows * columns).reshape(rows, columns).astype(float)


def pooled_ratio(numerators: Array, denominators: Array, draws: Draws) -> Array:
    """sum(numerators) / sum(denominators); not finite where the denominators sum to 0."""
    return divide(draws.total(numerators), draws.total(denominators))


def mean_ratio(numerators: Array, denominators: Array, draws: Draws) -> Array:
    """Mean of the ratios of each seed and question, over those whose denominator is positive."""
    valid = (denominators > 0).astype(float)
    ratios = np.where(valid > 0, numerators / np.where(valid > 0, denominators, 1.0), 0.0)
    return divide(draws.total(ratios), draws.total(valid))


def set_mean_ratio(numerators: Array, denominators: Array, strata: Sequence[str], draws: Draws) -> Array:
    """Mean over the question sets of the pooled ratio of each."""
    names = np.asarray(strata)
    sets = [draws.within(names == name) for name in dict.fromkeys(strata)] or [draws]
    ratios: Array = np.mean([pooled_ratio(numerators, denominators, members) for members in sets], axis=0)
    return ratios


def divide(numerator: Array, denominator: Array) -> Array:
    """Ratio of two figures, sample by sample; not finite where it is undefined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Array = numerator / denominator
    return ratio


def bounds(figure: Array) -> tuple[float, float, float] | None:
    """Value of a `figure` [1 + B] and its central `LEVEL` percentile interval.

    None when the value is undefined; undefined samples are dropped.
    """
    finite = figure[1:][np.isfinite(figure[1:])]
    if not np.isfinite(figure[0]) or len(finite) == 0:
        return None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(figure[0]), float(low), float(high)


def step_acceptance(accepted_counts: Sequence[Sequence[int]], depth: int) -> tuple[float | None, ...]:
    """Step-wise acceptance rate count(> k) / count(>= k) of accepted drafts per pass, for draft steps k < depth.

    Entry a of each member of `accepted_counts` is the number of passes that accepted exactly a drafts. None where no
    pass accepted k drafts.
    """
    totals = [sum(counts[a] for counts in accepted_counts if a < len(counts)) for a in range(depth + 1)]
    at_least = [sum(totals[k:]) for k in range(depth + 1)]
    return tuple(at_least[k + 1] / at_least[k] if at_least[k] else None for k in range(depth))
