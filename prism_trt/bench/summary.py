"""Figures from raw records: a pure function of what was counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from prism_trt.bench.results import (
    OVERALL,
    VANILLA,
    BenchSettings,
    GenerationRecord,
    Interval,
    QuestionRecord,
    Rates,
    Summary,
)
from prism_trt.bench.statistics import (
    Array,
    mean_ratio,
    mean_ratio_interval,
    pooled_ratio,
    pooled_ratio_interval,
    resample,
    speedup,
    speedup_interval,
    step_acceptance,
)
from prism_trt.config import TreeShape


def summarise(
    records: Sequence[QuestionRecord], skipped: dict[str, int], settings: BenchSettings
) -> tuple[Summary, ...]:
    """Summaries per tree: one per set in order of appearance, then one over all sets."""
    names = list(dict.fromkeys([*(record.set for record in records), *skipped]))
    summaries = []
    for tree in settings.trees:
        for name in names:
            members = [record for record in records if record.set == name]
            summaries.append(_summary(name, tree, members, skipped.get(name, 0), settings))
        summaries.append(_summary(OVERALL, tree, records, sum(skipped.values()), settings))
    return tuple(summaries)


def all_identical(records: Sequence[QuestionRecord]) -> bool | None:
    """Whether every question was answered identically; None when none was comparable."""
    known = [record.identical for record in records if record.identical is not None]
    return all(known) if known else None


def _summary(
    name: str, shape: TreeShape, records: Sequence[QuestionRecord], skipped: int, settings: BenchSettings
) -> Summary:
    tree = str(shape)

    def column(mode: str, value: Callable[[GenerationRecord], float]) -> Array:
        return np.array(
            [sum(value(entry) for entry in record.generations if entry.mode == mode) for record in records], dtype=float
        )

    tokens, passes = column(tree, lambda entry: entry.decode_tokens), column(tree, lambda entry: entry.target_passes)
    seconds, total = column(tree, lambda entry: entry.decode_seconds), column(tree, lambda entry: entry.total_seconds)
    output = column(tree, lambda entry: entry.output_tokens)
    base_tokens = column(VANILLA, lambda entry: entry.decode_tokens)
    base_seconds = column(VANILLA, lambda entry: entry.decode_seconds)
    base_output = column(VANILLA, lambda entry: entry.output_tokens)
    base_total = column(VANILLA, lambda entry: entry.total_seconds)
    drawn = resample([record.set for record in records], settings.bootstrap_samples, settings.seed)
    drafts = [entry for record in records for entry in record.generations if entry.mode == tree]
    return Summary(
        set=name,
        tree=tree,
        questions=len(records),
        skipped=skipped,
        vanilla=Rates(
            decode_tps=pooled_ratio(base_tokens, base_seconds), end_to_end_tps=pooled_ratio(base_output, base_total)
        ),
        prism=Rates(decode_tps=pooled_ratio(tokens, seconds), end_to_end_tps=pooled_ratio(output, total)),
        speedup=speedup(tokens, seconds, base_tokens, base_seconds),
        speedup_interval=_interval(speedup_interval(tokens, seconds, base_tokens, base_seconds, drawn)),
        end_to_end_speedup=speedup(output, total, base_output, base_total),
        al_pooled=pooled_ratio(tokens, passes),
        al_pooled_interval=_interval(pooled_ratio_interval(tokens, passes, drawn)),
        al_question_mean=mean_ratio(tokens, passes),
        al_question_mean_interval=_interval(mean_ratio_interval(tokens, passes, drawn)),
        step_acceptance=step_acceptance([entry.accepted_counts for entry in drafts], shape.depth),
        identical=all_identical(records),
    )


def _interval(bounds: tuple[float, float] | None) -> Interval | None:
    return Interval(low=bounds[0], high=bounds[1]) if bounds else None
