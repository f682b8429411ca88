"""Acceptance length, throughput and their confidence intervals from per-question counts.

Acceptance length (AL) is committed tokens per verification pass of the target, the bonus token included. It is given
pooled (sum of tokens / sum of passes, as SGLang-based evaluations do) and as the mean over questions of per-question
ratios (as the torch evaluations of EAGLE, HASS and PRISM do). Arrays are float64 [Q], one entry per question.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

LEVEL = 0.95


def pooled_ratio(numerators: Array, denominators: Array) -> float | None:
    """sum(numerators) / sum(denominators); None when the denominators sum to 0."""
    total = float(denominators.sum())
    return float(numerators.sum()) / total if total > 0 else None


def mean_ratio(numerators: Array, denominators: Array) -> float | None:
    """Mean of per-question ratios over the questions whose denominator is positive; None when there is none."""
    valid = denominators > 0
    return float((numerators[valid] / denominators[valid]).mean()) if valid.any() else None


def resample(strata: Sequence[str], samples: int, seed: int) -> Indices:
    """Bootstrap indices [samples, Q]: questions drawn with replacement within their stratum (question set).

    Sets are a fixed part of the benchmark, so only the choice of questions within them is resampled.
    """
    generator = np.random.default_rng(seed)
    names = np.asarray(strata)
    drawn = np.empty((samples, len(names)), dtype=np.int64)
    for name in dict.fromkeys(strata):
        members = np.flatnonzero(names == name)
        drawn[:, members] = members[generator.integers(0, len(members), size=(samples, len(members)))]
    return drawn


def interval(values: Array) -> tuple[float, float] | None:
    """Central `LEVEL` percentile interval of bootstrap `values` [samples]; non-finite samples are dropped."""
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def pooled_ratio_interval(numerators: Array, denominators: Array, drawn: Indices) -> tuple[float, float] | None:
    """Bootstrap interval of `pooled_ratio`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return interval(numerators[drawn].sum(axis=1) / denominators[drawn].sum(axis=1))


def mean_ratio_interval(numerators: Array, denominators: Array, drawn: Indices) -> tuple[float, float] | None:
    """Bootstrap interval of `mean_ratio`."""
    valid = denominators > 0
    ratios = np.where(valid, numerators / np.where(valid, denominators, 1.0), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return interval(ratios[drawn].sum(axis=1) / valid[drawn].sum(axis=1))


def speedup(tokens: Array, seconds: Array, base_tokens: Array, base_seconds: Array) -> float | None:
    """Ratio of pooled tokens per second to the pooled tokens per second of the base."""
    rate, base = pooled_ratio(tokens, seconds), pooled_ratio(base_tokens, base_seconds)
    return rate / base if rate is not None and base else None


def speedup_interval(
    tokens: Array, seconds: Array, base_tokens: Array, base_seconds: Array, drawn: Indices
) -> tuple[float, float] | None:
    """Bootstrap interval of `speedup`; both modes are resampled with the same questions because they are paired."""
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = tokens[drawn].sum(axis=1) / seconds[drawn].sum(axis=1)
        base = base_tokens[drawn].sum(axis=1) / base_seconds[drawn].sum(axis=1)
        return interval(rate / base)


def step_acceptance(accepted_counts: Sequence[Sequence[int]], depth: int) -> tuple[float | None, ...]:
    """Step-wise acceptance rate count(> k) / count(>= k) of accepted drafts per pass, for draft steps k < depth.

    Entry a of each member of `accepted_counts` is the number of passes that accepted exactly a drafts. None where no
    pass accepted k drafts.
    """
    totals = [sum(counts[a] for counts in accepted_counts if a < len(counts)) for a in range(depth + 1)]
    at_least = [sum(totals[k:]) for k in range(depth + 1)]
    return tuple(at_least[k + 1] / at_least[k] if at_least[k] else None for k in range(depth))
