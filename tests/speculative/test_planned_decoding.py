"""Requests whose rounds a planner shapes: the output is the target's whatever it picks, and the drafter keeps up."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_trt.build.latency import measure
from prism_trt.config import TreeShape
from prism_trt.engines.protocol import Engine
from prism_trt.errors import PrismError
from prism_trt.speculative.decoder import Decoder, Request, generate
from prism_trt.speculative.planner import Load, Plan, Planner, possible_plans
from prism_trt.speculative.sampling import SamplingParams, make_generator
from prism_trt.target.loading import Target
from tests.speculative.bag_engine import BagEngine, FusedBagEngine
from tests.speculative.distributions import p_value
from tests.speculative.test_decoder import TREES, full_features, prompts, reference
from tests.speculative.test_lossless import make_engine, target, tokens_of
from tests.speculative.test_lossless import prompts as model_prompts
from tests.speculative.test_planner import drafting, processor, table

__all__ = ["target"]


class AnyPlan(Planner):
    """Picks each round's plan at random, and often none for a while."""

    def __init__(self, engine: Engine, seed: int, plans: list[Plan]) -> None:
        super().__init__(engine, table(processor, drafting))
        self._draw, self._choices = random.Random(seed), plans

    def plan(self, load: Load, behind: int = 0) -> Plan:
        return self._draw.choice(self._choices) if self._draw.random() < 0.6 else None


@given(
    seed=st.integers(0, 10**6), count=st.integers(1, 7), slots=st.integers(1, 4), tokens_per_call=st.integers(20, 70)
)
@settings(max_examples=15, deadline=None)
def test_greedy_output_is_the_targets_whatever_is_planned(
    seed: int, count: int, slots: int, tokens_per_call: int
) -> None:
    engine = FusedBagEngine(seed, 40, None, slots, 60, tokens_per_call, 0.5, modules=3)
    requests = [Request(prompt, 8 + 5 * i, tree="auto") for i, prompt in enumerate(prompts(count, seed, longest=40))]
    results = generate(engine, requests, planner=AnyPlan(engine, seed, [*TREES]))
    for request, result in zip(requests, results, strict=True):
        assert result.tokens == reference(engine, request.prompt, len(result.tokens))


def test_drafts_after_rounds_without_one_are_those_of_steady_drafting(target: Target) -> None:
    # What the drafter has caught up with must not show: a fixed tree then drafts, and gets accepted, the same.
    class Late(AnyPlan):
        def plan(self, load: Load, behind: int = 0) -> Plan:
            self.count = getattr(self, "count", 0) + 1
            return None if self.count <= 12 else tree

    tree = TreeShape(depth=4, width=3, size=10)
    engine = make_engine(target, tokens_per_call=24)
    for prompt in model_prompts(target, 4, seed=2):
        late = generate(engine, [Request(prompt, 40, tree="auto")], planner=Late(engine, 0, []))[0]
        continued = prompt + late.tokens[:13]
        steady = generate(engine, [Request(continued, 27, tree=tree)])[0]
        assert steady.tokens == late.tokens[13:]
        # The prefill of the continued prompt gives the token that a round gives in the other run.
        assert late.statistics.accepted > 0
        assert late.statistics.target_passes - 12 == pytest.approx(steady.statistics.target_passes, abs=2)


def test_planned_requests_give_what_vanilla_gives_on_a_measured_engine(target: Target) -> None:
    engine = make_engine(target, slots=4)
    planner = Planner(engine, measure(engine, seconds=2.0))
    inputs = model_prompts(target, 10, seed=3)
    vanilla = tokens_of(generate(engine, [Request(prompt, 40) for prompt in inputs]))
    planned = generate(engine, [Request(prompt, 40, tree="auto") for prompt in inputs], planner=planner)
    assert tokens_of(planned) == vanilla
    assert planner.rounds.total() >= 90
    assert set(planner.rounds) <= set(possible_plans(engine))


def test_sampled_output_of_planned_requests_follows_the_targets_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    # Requests with a seed are not planned, and a test with fresh seeds would fail once in a thousand runs.
    seeds = iter(range(10**6))
    monkeypatch.setattr(
        "prism_trt.speculative.row.make_generator",
        lambda params: make_generator(params.model_copy(update={"seed": next(seeds)})),
    )
    vocab, draws = 5, 4000
    engine = BagEngine(3, vocab, slots=500, context=24, tokens_per_call=4000)
    trees: list[Plan] = [TreeShape(depth=3, width=2, size=6), TreeShape(depth=1, width=4, size=4)]
    requests = [Request([2, 0], 3, SamplingParams(temperature=0.9), tree="auto") for _ in range(draws)]
    results = generate(engine, requests, planner=AnyPlan(engine, 1, trees))
    tables = []
    for depth in range(3):
        chances = torch.empty(*[vocab] * (depth + 1))
        for prefix in product(range(vocab), repeat=depth):
            logits = (2 * full_features(engine, [2, 0, *prefix])[-1] @ engine.head).float()
            chances[prefix] = (logits / 0.9).softmax(0)
        tables.append(chances)
    assert p_value(torch.tensor([result.tokens for result in results]), tables) > 1e-3


def test_a_seed_draws_the_same_in_any_company() -> None:
    engine = BagEngine(2)
    seeded = Request(prompts(1, 5)[0], 20, SamplingParams(temperature=1.2, seed=3), tree="auto")
    alone = generate(engine, [seeded], planner=AnyPlan(engine, 0, [*TREES]))[0].tokens
    company = [Request(prompt, 25, tree="auto") for prompt in prompts(3, 6)]
    for seed in range(3):
        together = generate(engine, [seeded, *company], planner=AnyPlan(engine, seed, [*TREES]))
        assert together[0].tokens == alone


def test_auto_needs_a_planner_and_means_vanilla_without_a_drafter() -> None:
    engine = BagEngine(1)
    with pytest.raises(PrismError, match="needs a planner"):
        Decoder(engine).add(Request([1], 4, tree="auto"))
    engine.has_drafter = False
    result = generate(engine, [Request([1, 2], 6, tree="auto")])[0]
    assert result.tokens == reference(engine, [1, 2], 6)


@pytest.mark.parametrize("seed", range(4))
def test_prefixes_left_by_planned_requests_can_be_reused(seed: int) -> None:
    # The drafter may lag behind the target in what a request leaves.
    engine = FusedBagEngine(seed, slots=2, context=120)
    decoder = Decoder(engine, reuse_prefixes=True, planner=AnyPlan(engine, seed, [*TREES]))
    prompt, reused = prompts(1, seed)[0], 0
    for _ in range(4):
        number = decoder.add(Request(prompt, 12, tree="auto"))
        tokens: list[int] = []
        while decoder.active:
            for event in decoder.step():
                assert event.id == number
                tokens += event.tokens
                reused += 0 if event.stats is None else event.stats.reused_tokens
        assert tokens == reference(engine, prompt, 12)
        prompt = prompt + tokens + [seed]
    assert reused > 0
