"""Throughput by batch size: vanilla decoding, fixed trees and the planner, in turn on the same requests."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import numpy as np
from pydantic import Field

from prism_trt.bench.bandwidth import BandwidthProbe
from prism_trt.bench.results import VANILLA, Bandwidth, EngineInfo, Environment, Estimate
from prism_trt.bench.runner import environment, in_turn, summarise_bandwidth
from prism_trt.bench.statistics import Array, Draws, bounds, divide, draw_questions
from prism_trt.config import StrictModel, TreeShape
from prism_trt.engines.protocol import Engine
from prism_trt.errors import PrismError
from prism_trt.speculative.decoder import Decoder
from prism_trt.speculative.planner import Plan, Planner
from prism_trt.speculative.request import AUTO, Request, RequestTree

PLANNER = "planner"


class SweepSettings(StrictModel):
    """What is run."""

    batches: tuple[int, ...] = Field(min_length=1, description="requests running at a time")
    trees: tuple[TreeShape, ...] = Field(min_length=1, description="fixed trees")
    max_new_tokens: int = Field(96, ge=2)
    repeats: int = Field(4, ge=1, description="blocks per batch size; each runs every mode on the same requests")
    least_answers: int = Field(6, ge=1, description="answers' worth of tokens in a block, if more than two batches")
    seed: int = Field(0, ge=0, description="of the bootstrap")
    bootstrap_samples: int = Field(2000, ge=1)


class SweepSample(StrictModel):
    """One mode in one block."""

    batch: int
    repeat: int
    mode: str = Field(description="vanilla, planner, or a tree as SIZE/WIDTH/DEPTH")
    tokens: int = Field(description="put out in the time")
    seconds: float
    identical: bool = Field(description="every request's tokens are vanilla's, as far as both went")
    rounds: dict[str, int] = Field(description="the planner's rounds by plan")


class SweepPoint(StrictModel):
    """One mode at one batch size, over all blocks."""

    batch: int
    mode: str
    tokens_per_second: float
    to_vanilla: Estimate | None = Field(description="ratio of tokens per second")
    to_best_tree: Estimate | None = Field(
        description="of the planner: to the fixed tree with the most tokens per second"
    )
    plans: dict[str, float] = Field(description="of the planner: share of its rounds by plan")


class SweepResult(StrictModel):
    """Everything one sweep wrote down."""

    kind: Literal["batch-sweep"] = "batch-sweep"
    format: Literal[1] = 1
    settings: SweepSettings
    engine: EngineInfo
    environment: Environment
    bandwidth_gb_s: Bandwidth
    identical: bool
    points: tuple[SweepPoint, ...]
    crossovers: dict[str, float | None] = Field(description="by tree: batch size from which vanilla is faster")
    samples: tuple[SweepSample, ...]

    def point(self, batch: int, mode: str) -> SweepPoint:
        """The figures of one mode at one batch size."""
        return next(point for point in self.points if (point.batch, point.mode) == (batch, mode))


@dataclass(frozen=True)
class _Mode:
    name: str
    tree: RequestTree


def run_sweep(
    engine: Engine,
    info: EngineInfo,
    planner: Planner,
    prompts: Sequence[list[int]],
    eos_token_ids: tuple[int, ...],
    settings: SweepSettings,
    on_run: Callable[[], None] = lambda: None,
) -> SweepResult:
    """Measure every mode at every batch size.

    In a block, a fixed number of requests runs at a time and each that ends is followed by the next, as in a busy
    server. The first ones are of all lengths, so that later ones come one by one. Time runs from when all have their
    first token until so many more tokens are out; what is spent on prefilling the successors counts as well. The modes
    of a block take turns on the same requests in rotating order, so that drift of a shared machine hits all alike, and
    ratios are taken within blocks.

    Args:
        engine: with a drafter and enough slots.
        planner: of this engine; it keeps what it learns from block to block, as in a server.
        prompts: token ids; taken in order, over and over.
        on_run: called after each of ``count_runs(settings)`` runs.

    Raises:
        PrismError: the engine has no drafter or too few slots, or a prompt does not fit its context.
    """
    _check(engine, prompts, settings)
    modes: list[_Mode] = [
        _Mode(VANILLA, None),
        *(_Mode(str(tree), tree) for tree in settings.trees),
        _Mode(PLANNER, AUTO),
    ]
    probe = BandwidthProbe()
    bandwidth: list[float] = []
    samples: list[SweepSample] = []
    taken = 0
    # So that no run pays for the first use of anything, such as a slot's memory in the target and in the drafter.
    slots, most = engine.limits.slots, settings.max_new_tokens
    _run(engine, _requests(prompts, 0, 1, AUTO, most, eos_token_ids), slots, slots * most, planner)
    for mode in modes:
        _run(engine, _requests(prompts, 0, 1, mode.tree, 16, eos_token_ids), 1, 16, planner)
    for repeat in range(settings.repeats):
        for place, batch in enumerate(settings.batches):
            bandwidth.append(probe.measure())
            wanted = max(2 * batch, settings.least_answers) * most
            outputs: dict[str, list[list[int]]] = {}
            block: list[SweepSample] = []
            for mode in in_turn(modes, repeat + place):
                before = Counter(planner.rounds)
                requests = _requests(prompts, taken, batch, mode.tree, most, eos_token_ids)
                tokens, seconds, outputs[mode.name] = _run(engine, requests, batch, wanted, planner)
                rounds = {_plan_name(plan): n for plan, n in (planner.rounds - before).items()}
                fields = {"batch": batch, "repeat": repeat, "mode": mode.name, "tokens": tokens, "seconds": seconds}
                block.append(SweepSample(**fields, identical=True, rounds=rounds))
                on_run()
            taken += max(map(len, outputs.values()))
            for sample in block:
                same = all(map(_agree, outputs[sample.mode], outputs[VANILLA]))
                samples.append(sample.model_copy(update={"identical": same}))
    points = summarise_sweep(samples, settings)
    return SweepResult(
        settings=settings,
        engine=info,
        environment=environment(),
        bandwidth_gb_s=summarise_bandwidth(bandwidth),
        identical=all(sample.identical for sample in samples),
        points=points,
        crossovers={str(tree): crossover(points, str(tree)) for tree in settings.trees},
        samples=tuple(samples),
    )


def count_runs(settings: SweepSettings) -> int:
    """Runs of `run_sweep`."""
    return settings.repeats * len(settings.batches) * (2 + len(settings.trees))


def summarise_sweep(samples: Sequence[SweepSample], settings: SweepSettings) -> tuple[SweepPoint, ...]:
    """Pooled tokens per second and their ratios, with bootstrap intervals over blocks."""
    names = [VANILLA, *map(str, settings.trees), PLANNER]
    points = []
    for batch in settings.batches:
        chosen = {name: [s for s in samples if (s.batch, s.mode) == (batch, name)] for name in names}
        blocks = len(chosen[VANILLA])
        drawn = draw_questions(["block"] * blocks, settings.bootstrap_samples, settings.seed)
        draws = Draws(drawn, np.ones((1 + settings.bootstrap_samples, 1)))
        rates = {name: _rate(entries, draws) for name, entries in chosen.items()}
        best = max(map(str, settings.trees), key=lambda name: rates[name][0])
        for name in names:
            plans = _shares(chosen[name])
            points.append(
                SweepPoint(
                    batch=batch,
                    mode=name,
                    tokens_per_second=float(rates[name][0]),
                    to_vanilla=None if name == VANILLA else _estimate(divide(rates[name], rates[VANILLA])),
                    to_best_tree=_estimate(divide(rates[name], rates[best])) if name == PLANNER else None,
                    plans=plans if name == PLANNER else {},
                )
            )
    return tuple(points)


def crossover(points: Sequence[SweepPoint], mode: str) -> float | None:
    """Batch size at which `mode` is as fast as vanilla, interpolated over its logarithm; None when it always is faster.

    The first batch size when it is slower there already.
    """
    ratios = [(point.batch, point.to_vanilla.value) for point in points if point.mode == mode and point.to_vanilla]
    before: tuple[int, float] | None = None
    for batch, ratio in sorted(ratios):
        if ratio < 1:
            if before is None:
                return float(batch)
            share = (before[1] - 1) / (before[1] - ratio)
            return before[0] * (batch / before[0]) ** share
        before = (batch, ratio)
    return None


def _check(engine: Engine, prompts: Sequence[list[int]], settings: SweepSettings) -> None:
    if not engine.has_drafter:
        raise PrismError("the engine has no drafter, so there is nothing to compare: build it with one")
    if max(settings.batches) > engine.limits.slots:
        raise PrismError(
            f"a batch of {max(settings.batches)} needs as many slots but the engine has {engine.limits.slots}: build "
            f"it with --slots {max(settings.batches)}"
        )
    longest = max(map(len, prompts)) + settings.max_new_tokens
    if longest > engine.limits.context:
        raise PrismError(
            f"the longest prompt and {settings.max_new_tokens} new tokens need {longest} tokens of context but the "
            f"engine has {engine.limits.context}: lower --max-new-tokens or leave that prompt out"
        )


def _requests(
    prompts: Sequence[list[int]], first: int, batch: int, tree: RequestTree, most: int, eos_token_ids: tuple[int, ...]
) -> Iterator[Request]:
    """Endless requests of at most `most` tokens; the first `batch` of them end at evenly spaced times."""
    for i in count():
        length = max(2, most * (i + 1) // batch) if i < batch else most
        yield Request(prompts[(first + i) % len(prompts)], length, eos_token_ids=eos_token_ids, tree=tree)


def _run(
    engine: Engine, requests: Iterator[Request], batch: int, wanted: int, planner: Planner
) -> tuple[int, float, list[list[int]]]:
    """Tokens (`wanted` or a few more) and seconds with `batch` requests running; every request's tokens so far."""
    decoder = Decoder(engine, planner=planner)
    outputs: list[list[int]] = []
    begun: set[int] = set()
    start, tokens = math.nan, 0
    while tokens < wanted:
        while decoder.active < batch:
            decoder.add(next(requests))
            outputs.append([])
        for event in decoder.step():
            begun.add(event.id)
            outputs[event.id] += event.tokens
            tokens += 0 if math.isnan(start) else len(event.tokens)
        if math.isnan(start) and len(begun) >= batch:
            start = time.perf_counter()
    return tokens, time.perf_counter() - start, outputs


def _agree(some: list[int], others: list[int]) -> bool:
    length = min(len(some), len(others))
    return some[:length] == others[:length]


def _rate(samples: Sequence[SweepSample], draws: Draws) -> Array:
    tokens = np.array([[sample.tokens for sample in samples]], dtype=float)
    seconds = np.array([[sample.seconds for sample in samples]])
    return divide(draws.total(tokens), draws.total(seconds))


def _estimate(figure: Array) -> Estimate | None:
    found = bounds(figure)
    return Estimate(value=found[0], low=found[1], high=found[2]) if found else None


def _shares(samples: Sequence[SweepSample]) -> dict[str, float]:
    rounds: Counter[str] = Counter()
    for sample in samples:
        rounds.update(sample.rounds)
    return {name: count / rounds.total() for name, count in rounds.most_common()}


def _plan_name(plan: Plan) -> str:
    return "none" if plan is None else str(plan)
