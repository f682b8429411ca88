"""The planner's models, and its choices in simulated worlds that its table and prior describe well, badly or not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_trt.config import DrafterConfig, TreeShape
from prism_trt.engines.latency import LatencyTable
from prism_trt.speculative.acceptance import (
    MOST_STEPS,
    AcceptanceEstimate,
    AcceptancePrior,
    node_chances,
    reached,
)
from prism_trt.speculative.planner import Load, Plan, Planner, possible_plans
from tests.speculative.bag_engine import BagEngine

SHAPES = [TreeShape.parse(text) for text in ("2/1/1", "5/1/4", "6/2/3", "8/4/5", "16/4/6", "60/10/6")]
chances = st.lists(st.floats(0.01, 0.97), min_size=6, max_size=6)
others = st.floats(0, 0.5)


def expected_accepted(first: list[float], other: float, shape: TreeShape) -> float:
    return sum(reached(node_chances(first, other, shape.width, shape.depth), shape))


def expected_by_enumeration(first: list[float], other: float, shape: TreeShape) -> float:
    """The same tree grown node by node as `prism_trt.speculative.tree` documents it."""
    level, drafted = [1.0], []
    for k in range(shape.depth):
        children = []
        for parent in level:
            missed, rest = 1 - first[k], min(other, first[k])
            children.append(parent * first[k])
            for _ in range(shape.width - 1):
                children.append(parent * missed * rest)
                missed *= 1 - rest
        drafted += children
        level = sorted(children, reverse=True)[: shape.width]
    return sum(sorted(drafted, reverse=True)[: shape.size - 1])


@given(first=chances, other=others, shape=st.sampled_from(SHAPES))
def test_expected_acceptance_is_that_of_the_documented_tree(first: list[float], other: float, shape: TreeShape) -> None:
    assert expected_accepted(first, other, shape) == pytest.approx(expected_by_enumeration(first, other, shape))
    by_depth = reached(node_chances(first, other, shape.width, shape.depth), shape)
    assert all(a >= b - 1e-12 for a, b in zip((1.0, *by_depth), by_depth, strict=False))


@given(first=chances, other=others, shape=st.sampled_from(SHAPES), step=st.integers(0, 5), more=st.floats(0, 0.5))
def test_expected_acceptance_grows_with_every_chance_and_with_the_tree(
    first: list[float], other: float, shape: TreeShape, step: int, more: float
) -> None:
    least = expected_accepted(first, other, shape) - 1e-9
    raised = [min(0.98, chance + more) if k == step else chance for k, chance in enumerate(first)]
    assert expected_accepted(raised, other, shape) >= least
    for wider, deeper, larger in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        if shape.depth + deeper <= 6 and (shape.width > 1 or not larger):
            grown = TreeShape(depth=shape.depth + deeper, width=shape.width + wider, size=shape.size + larger)
            assert expected_accepted(first, other, grown) >= least


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_estimates_find_what_a_tree_gets_accepted(shape: TreeShape) -> None:
    first, other = [0.75, 0.6, 0.5, 0.45, 0.4, 0.4], 0.3
    true = [1.0, *reached(node_chances(first, other, shape.width, shape.depth), shape)]
    estimate, draw = AcceptanceEstimate(AcceptancePrior()), random.Random(0)
    for _ in range(400):
        chance = draw.random()
        estimate.observe(shape, [sum(chance < reach for reach in true[1:])], shape.size - 1)
    assert estimate.accepted(shape) == pytest.approx(sum(true[1:]), rel=0.15)
    if shape.width == 1:
        assert estimate.first[0] == pytest.approx(first[0], abs=0.1)
    # Another tree's acceptance follows from the model.
    other_shape = TreeShape.parse("8/4/4")
    assert estimate.accepted(other_shape) == pytest.approx(expected_accepted(first, other, other_shape), rel=0.35)


def test_the_prior_is_what_training_simulated() -> None:
    fields = {"hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8}
    more = {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "num_modules": 1, "step_map": (0,), "target_fingerprint": ""}
    simulated = {"simulated_acceptance": {"top1": [0.6, 0.5], "top4": [0.784, 0.7]}}
    prior = AcceptancePrior.of(DrafterConfig(**fields, **more, provenance=simulated))
    assert prior.first == (0.6, 0.5)
    chances = node_chances(prior.first, prior.others, 4, 1)[0]
    assert sum(chances) == pytest.approx(0.784)
    for nothing in ({}, {"simulated_acceptance": None}):
        assert AcceptancePrior.of(DrafterConfig(**fields, **more, provenance=nothing)) == AcceptancePrior()
    assert AcceptancePrior.of(None) == AcceptancePrior()


def table(pass_ms: Callable[[int], float], step_ms: Callable[[int], float]) -> LatencyTable:
    """A table of an engine whose calls take so long for so many tokens."""
    requests = (1, 2, 4, 8, 16, 32)
    return LatencyTable(
        context=128,
        forward={n: {t: pass_ms(n * t) for t in (1, 2, 4, 6, 8, 12, 16, 24, 32, 60)} for n in requests},
        draft_round={
            n: {f"{w + 1}/{w}/{d}": d * step_ms(n * w) for w in (1, 2, 4, 8) for d in (1, 5)} for n in requests
        },
        extend=step_ms(64) / 64,
    )


def processor(tokens: int) -> float:
    """Bound by memory up to 16 tokens, by arithmetic beyond."""
    return 5.0 * max(1.0, tokens / 16) + 0.05 * tokens


def drafting(tokens: int) -> float:
    return processor(tokens) / 15


def free(tokens: int) -> float:
    return 5.0


def new_planner(known: LatencyTable, prior: AcceptancePrior | None = None) -> Planner:
    return Planner(BagEngine(0, slots=32, context=256, tokens_per_call=512), known, prior)


@dataclass
class World:
    """Times and acceptance that the planner does not know."""

    planner: Planner
    pass_ms: Callable[[int], float]
    step_ms: Callable[[int], float]
    first: list[float]
    noise: float = 0.0
    draw: random.Random = field(default_factory=lambda: random.Random(1))
    picks: list[Plan] = field(default_factory=list)

    def milliseconds(self, plan: Plan, requests: int) -> float:
        if plan is None:
            return self.pass_ms(requests)
        return plan.depth * self.step_ms(requests * plan.width) + self.pass_ms(requests * plan.size)

    def reach(self, plan: TreeShape) -> list[float]:
        return list(reached(node_chances(self.first, 0.2, plan.width, plan.depth), plan))

    def rate(self, plan: Plan, requests: int) -> float:
        """Tokens per millisecond."""
        accepted = 0.0 if plan is None else sum(self.reach(plan))
        return requests * (1 + accepted) / self.milliseconds(plan, requests)

    def run(self, requests: int, rounds: int) -> float:
        """Tokens per millisecond of planned rounds."""
        tokens = total = 0.0
        for _ in range(rounds):
            plan = self.planner.plan(Load(requests, 0))
            self.picks.append(plan)
            ms = self.milliseconds(plan, requests) * math.exp(abs(self.draw.gauss(0, self.noise)))
            reach = [] if plan is None else self.reach(plan)
            accepted = []
            for _ in range(requests):
                chance = self.draw.random()
                accepted.append(sum(chance < r for r in reach))
            self.planner.observe(
                plan, Load(requests, 0), ms / 1e3, accepted, drafted=0.0 if plan is None else plan.size - 1
            )
            tokens += requests + sum(accepted)
            total += ms
        return tokens / total


def hopeless() -> list[float]:
    return [0.01] * MOST_STEPS


def typical() -> list[float]:
    return [0.7, 0.62, 0.58, 0.55, 0.5, 0.5] + [0.5] * 10


@pytest.mark.parametrize("requests", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_no_batch_size_loses_and_small_ones_get_the_best_tree(requests: int, noise: float) -> None:
    world = World(new_planner(table(processor, drafting)), processor, drafting, typical(), noise)
    world.run(requests, 300)
    # Without noise, what fixed plans get is known exactly; noise lengthens all alike.
    slower = 1.0 if not noise else math.exp(noise**2 / 2) * (1 + math.erf(noise / math.sqrt(2)))
    planned = world.run(requests, 1500) * slower
    best = max(world.rate(plan, requests) for plan in possible_plans(BagEngine(0, slots=32, tokens_per_call=512)))
    assert planned >= 0.94 * best
    assert planned >= 0.97 * world.rate(None, requests)


def test_nothing_accepted_means_no_speculation_and_few_trials() -> None:
    world = World(new_planner(table(processor, drafting), AcceptancePrior((0.7,))), processor, drafting, hopeless())
    world.run(1, 200)
    world.picks.clear()
    assert world.run(1, 1000) >= 0.975 * world.rate(None, 1)


def test_free_passes_mean_deep_trees() -> None:
    world = World(new_planner(table(free, lambda tokens: 0.01)), free, lambda tokens: 0.01, [0.9] * MOST_STEPS)
    world.run(4, 300)
    plan = world.picks[-1]
    assert plan is not None and plan.depth >= 6


@pytest.mark.parametrize("slower", [0.2, 1.0, 6.0])
def test_a_table_of_another_machine_is_corrected(slower: float) -> None:
    # The table promises cheap verification; this machine is faster or slower, and computes every token in turn.
    def serial(tokens: int) -> float:
        return slower * 3.0 * tokens

    world = World(new_planner(table(free, lambda tokens: 0.1)), serial, lambda tokens: 0.3 * slower, typical(), 0.1)
    world.run(8, 400)
    assert world.run(8, 600) >= 0.88 * world.rate(None, 8)


def test_speculation_is_taken_up_again_when_text_becomes_easy() -> None:
    world = World(new_planner(table(processor, drafting)), processor, drafting, hopeless())
    world.run(2, 500)
    assert world.picks[-20:].count(None) > 10
    world.first = typical()
    world.run(2, 1500)
    assert world.run(2, 500) >= 0.93 * max(world.rate(plan, 2) for plan in (None, *SHAPES))


def test_what_one_batch_size_saved_up_another_does_not_spend() -> None:
    world = World(new_planner(table(processor, drafting)), processor, drafting, typical())
    world.run(32, 600)
    assert max(world.rate(plan, 20) for plan in SHAPES) < world.rate(None, 20)
    for _ in range(3):
        assert world.run(20, 70) >= 0.97 * world.rate(None, 20)


def test_an_engine_without_drafter_never_speculates() -> None:
    engine = BagEngine(0)
    engine.has_drafter = False
    assert possible_plans(engine) == (None,)
