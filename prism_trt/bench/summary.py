"""Figures from raw records: a pure function of what was counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from prism_trt.bench.results import (
    OVERALL,
    VANILLA,
    BenchSettings,
    Comparison,
    Estimate,
    Figures,
    GenerationRecord,
    MethodInfo,
    QuestionRecord,
    Rates,
    Summary,
)
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
from prism_trt.config import TreeShape


def summarise(
    records: Sequence[QuestionRecord],
    skipped: dict[str, int],
    settings: BenchSettings,
    methods: Sequence[MethodInfo],
) -> tuple[Summary, ...]:
    """Summaries per temperature and tree: one per set in order of appearance, then over all sets, by method."""
    names = list(dict.fromkeys([*(record.set for record in records), *skipped]))
    summaries: list[Summary] = []
    for temperature in settings.temperatures:
        for tree in settings.trees:
            for name in [*names, OVERALL]:
                members = [record for record in records if name in (record.set, OVERALL)]
                left_out = sum(skipped.values()) if name == OVERALL else skipped.get(name, 0)
                summaries += _set_summaries(name, members, left_out, tree, temperature, settings, methods)
    return tuple(summaries)


def all_identical(answers: Iterable[bool | None]) -> bool | None:
    """Whether all comparable answers had vanilla's tokens; None when none was comparable."""
    known = [identical for identical in answers if identical is not None]
    return all(known) if known else None


@dataclass(frozen=True)
class _Runs:
    """What S training seeds of a method did on Q questions: sums over turns and repeats, float64 [S, Q] each.

    Seconds are NaN where they were not measured.
    """

    draws: Draws
    accepted_counts: list[list[tuple[int, ...]]]
    """[S], one entry per answer."""
    identical: list[bool | None]
    """[S]."""
    decode_tokens: Array
    target_passes: Array
    decode_seconds: Array
    output_tokens: Array
    total_seconds: Array

    def seed(self, index: int) -> _Runs:
        """One training seed alone."""
        one = slice(index, index + 1)
        return _Runs(
            draws=Draws(self.draws.questions, np.ones_like(self.draws.seeds[:, one])),
            accepted_counts=self.accepted_counts[one],
            identical=self.identical[one],
            decode_tokens=self.decode_tokens[one],
            target_passes=self.target_passes[one],
            decode_seconds=self.decode_seconds[one],
            output_tokens=self.output_tokens[one],
            total_seconds=self.total_seconds[one],
        )

    @cached_property
    def decode_rate(self) -> Array:
        return pooled_ratio(self.decode_tokens, self.decode_seconds, self.draws)

    @cached_property
    def end_to_end_rate(self) -> Array:
        return pooled_ratio(self.output_tokens, self.total_seconds, self.draws)

    @cached_property
    def al_pooled(self) -> Array:
        return pooled_ratio(self.decode_tokens, self.target_passes, self.draws)

    def al_set_mean(self, sets: Sequence[str]) -> Array:
        return set_mean_ratio(self.decode_tokens, self.target_passes, sets, self.draws)

    def rates(self) -> Rates:
        return Rates(decode_tps=_value(self.decode_rate), end_to_end_tps=_value(self.end_to_end_rate))


def _set_summaries(
    name: str,
    records: Sequence[QuestionRecord],
    skipped: int,
    tree: TreeShape,
    temperature: float,
    settings: BenchSettings,
    methods: Sequence[MethodInfo],
) -> list[Summary]:
    sets = [record.set for record in records]
    samples, seed = settings.bootstrap_samples, settings.seed
    questions = draw_questions(sets, samples, seed)
    vanilla = _runs(records, VANILLA, None, temperature, Draws(questions, np.ones((1 + samples, 1))))
    runs = {
        method.name: _runs(
            records,
            method.name,
            str(tree),
            temperature,
            Draws(questions, draw_seeds(len(method.engines), samples, (seed, number))),
        )
        for number, method in enumerate(methods)
        if method.name != VANILLA
    }
    reference = runs[settings.reference] if settings.reference is not None else None
    summaries = []
    for method, own in runs.items():
        count = len(own.identical)
        seeds = [_figures(own.seed(index), vanilla, sets, tree) for index in range(count)] if count > 1 else []
        compared = None if reference is None or reference is own else _compare(own, reference, sets)
        summaries.append(
            Summary(
                set=name,
                method=method,
                tree=str(tree),
                temperature=temperature,
                questions=len(records),
                skipped=skipped,
                vanilla=vanilla.rates(),
                training_seeds=tuple(seeds),
                to_reference=compared,
                **dict(_figures(own, vanilla, sets, tree)),
            )
        )
    return summaries


def _runs(records: Sequence[QuestionRecord], method: str, tree: str | None, temperature: float, draws: Draws) -> _Runs:
    wanted = (method, tree, temperature)
    cells: list[list[list[GenerationRecord]]] = [[[] for _ in records] for _ in range(draws.seeds.shape[1])]
    for index, record in enumerate(records):
        for entry in record.generations:
            if (entry.method, entry.tree, entry.temperature) == wanted:
                cells[entry.training_seed][index].append(entry)

    def sums(value: Callable[[GenerationRecord], float | None]) -> Array:
        return np.array([[sum(_number(value(entry)) for entry in cell) for cell in row] for row in cells], dtype=float)

    return _Runs(
        draws=draws,
        accepted_counts=[[entry.accepted_counts for cell in row for entry in cell] for row in cells],
        identical=[all_identical(entry.identical for cell in row for entry in cell) for row in cells],
        decode_tokens=sums(lambda entry: entry.decode_tokens),
        target_passes=sums(lambda entry: entry.target_passes),
        decode_seconds=sums(lambda entry: entry.decode_seconds),
        output_tokens=sums(lambda entry: entry.output_tokens),
        total_seconds=sums(lambda entry: entry.total_seconds),
    )


def _figures(runs: _Runs, vanilla: _Runs, sets: Sequence[str], tree: TreeShape) -> Figures:
    return Figures(
        rates=runs.rates(),
        speedup=_estimate(divide(runs.decode_rate, vanilla.decode_rate)),
        end_to_end_speedup=_estimate(divide(runs.end_to_end_rate, vanilla.end_to_end_rate)),
        al_pooled=_estimate(runs.al_pooled),
        al_question_mean=_estimate(mean_ratio(runs.decode_tokens, runs.target_passes, runs.draws)),
        al_set_mean=_estimate(runs.al_set_mean(sets)),
        step_acceptance=step_acceptance([counts for seed in runs.accepted_counts for counts in seed], tree.depth),
        identical=all_identical(runs.identical),
    )


def _compare(runs: _Runs, reference: _Runs, sets: Sequence[str]) -> Comparison:
    return Comparison(
        al_pooled=_estimate(divide(runs.al_pooled, reference.al_pooled)),
        al_set_mean=_estimate(divide(runs.al_set_mean(sets), reference.al_set_mean(sets))),
        decode_tps=_estimate(divide(runs.decode_rate, reference.decode_rate)),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _value(figure: Array) -> float | None:
    return float(figure[0]) if math.isfinite(figure[0]) else None


def _estimate(figure: Array) -> Estimate | None:
    found = bounds(figure)
    return Estimate(value=found[0], low=found[1], high=found[2]) if found else None
