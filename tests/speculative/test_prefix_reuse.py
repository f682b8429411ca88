"""Requests that go on from the K/V of others put out what they put out alone."""

from __future__ import annotations

import pytest
import torch

from prism_trt.config import TreeShape
from prism_trt.engines.protocol import Engine, EngineLimits, PrefixCopyEngine
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.speculative.decoder import Decoder
from prism_trt.speculative.request import Event, Request
from prism_trt.speculative.sampling import SamplingParams
from tests.speculative.bag_engine import BagEngine
from tests.speculative.engines import ENGINES, tiny_engine

TREE = TreeShape(depth=3, width=2, size=6)
LIMITS = EngineLimits(slots=2, context=160, tokens_per_call=32)


class CopyingBagEngine(BagEngine):
    """A `BagEngine` that can copy K/V between slots."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        for pool in (self.target_pool, self.draft_pool):
            pool[target] = torch.nan
            pool[target, :length] = pool[source, :length]


def words(count: int, seed: int, vocab: int = 40) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def finish(decoder: Decoder, requests: list[Request]) -> list[list[Event]]:
    """The events of requests that run together."""
    events: dict[int, list[Event]] = {decoder.add(request): [] for request in requests}
    while decoder.active:
        for event in decoder.step():
            events[event.id].append(event)
    return list(events.values())


def tokens(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


def reused(events: list[Event]) -> int:
    assert events[-1].stats is not None
    return events[-1].stats.reused_tokens


def alone(engine: Engine, request: Request) -> list[Event]:
    return finish(Decoder(engine), [request])[0]


@pytest.mark.parametrize("tree", [None, TREE, TreeShape(depth=6, width=4, size=6)], ids=str)
@pytest.mark.parametrize("kind", [BagEngine, CopyingBagEngine])
def test_a_conversation_goes_on_where_it_was(kind: type[BagEngine], tree: TreeShape | None) -> None:
    engine = kind(seed=3, slots=3, context=160, tokens_per_call=32)
    decoder = Decoder(engine, reuse_prefixes=True)
    conversation = words(30, 0)
    for turn in range(4):
        request = Request(conversation, 11, SamplingParams(temperature=0.8 * (turn % 2), seed=turn), tree=tree)
        other = Request(words(25, 50 + turn), 9, tree=tree)
        events, others = finish(decoder, [request, other])
        assert tokens(events) == tokens(alone(kind(3, slots=3, context=160, tokens_per_call=32), request))
        assert tokens(others) == tokens(alone(kind(3, slots=3, context=160, tokens_per_call=32), other))
        if turn:
            # All of the last turn but its last round, which the drafter was not extended over.
            depth = tree.depth if tree else 0
            assert reused(events) >= len(conversation) - 6 - depth - 2
        conversation = [*conversation, *tokens(events), *words(5, 90 + turn)]
    assert decoder.cached_slots == 3


def test_a_running_request_lends_its_prefix() -> None:
    engine = CopyingBagEngine(seed=4, slots=2, context=160, tokens_per_call=32)
    decoder = Decoder(engine, reuse_prefixes=True)
    system = words(60, 1)
    first = Request([*system, 3, 4], 40, tree=TREE)
    number = decoder.add(first)
    for _ in range(3):
        events = decoder.step()
    second = Request([*system, 5, 6, 7], 12, tree=TREE)
    decoder.add(second)
    collected: dict[int, list[Event]] = {number: events, number + 1: []}
    engine.calls.clear()
    while decoder.active:
        for event in decoder.step():
            collected[event.id].append(event)
    assert reused(collected[number + 1]) == len(system) - 1  # draft entry 59 holds the token behind the prefix
    assert ("forward", 4) in engine.calls
    fresh = BagEngine(seed=4, slots=2, context=160, tokens_per_call=32)
    assert tokens(collected[number + 1]) == tokens(alone(fresh, second))
    assert tokens(alone(fresh, first))[-len(tokens(collected[number])) :] == tokens(collected[number])


def test_cancelled_and_undrafted_requests_leave_what_they_have() -> None:
    decoder = Decoder(BagEngine(seed=5, slots=1, context=160, tokens_per_call=16), reuse_prefixes=True)
    prompt = words(40, 2)
    number = decoder.add(Request(prompt, 5))
    decoder.step()
    decoder.cancel(number)
    (events,) = finish(decoder, [Request(prompt, 5)])
    assert reused(events) == 16
    # It had no use for the drafter, so one who has must compute everything; features are stored nowhere either.
    drafting = Request(prompt, 5, tree=TREE)
    (events,) = finish(decoder, [drafting])
    assert reused(events) == 0
    assert tokens(events) == tokens(alone(BagEngine(seed=5, slots=1, context=160, tokens_per_call=16), drafting))
    (events,) = finish(decoder, [Request(prompt, 5, collect_features=True)])
    assert reused(events) == 0
    assert events[-1].features is not None and len(events[-1].features) == 44


def test_nothing_is_reused_unasked() -> None:
    decoder = Decoder(BagEngine(seed=5))
    request = Request(words(20, 2), 5)
    assert [reused(finish(decoder, [request])[0]) for _ in range(2)] == [0, 0]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return tiny_engine(request.param, LIMITS)


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.9, seed=5)], ids=str)
@pytest.mark.parametrize("tree", [None, TREE], ids=str)
def test_log_probabilities_do_not_depend_on_reuse(
    engine: Engine, tree: TreeShape | None, sampling: SamplingParams
) -> None:
    decoder = Decoder(engine, reuse_prefixes=True)
    conversation = words(37, 7, 320)
    turns = []
    for turn in range(3):
        request = Request(conversation, 14, sampling, tree=tree, log_probs=2)
        (events,) = finish(decoder, [request])
        assert (reused(events) > len(conversation) / 2) == (turn > 0)
        turns.append((request, events))
        conversation = [*conversation, *tokens(events), *words(4, 8 + turn, 320)]
    for request, events in turns:
        for event, expected in zip(events, alone(engine, request), strict=True):
            assert event.tokens == expected.tokens
            if isinstance(engine, TorchEngine):
                log_probs = [token.log_prob for token in expected.scored]
                assert [token.log_prob for token in event.scored] == pytest.approx(log_probs, abs=1e-4)
            else:
                assert event.scored == expected.scored  # bit by bit


def test_prefixes_are_copied_between_slots(engine: Engine) -> None:
    assert isinstance(engine, PrefixCopyEngine)
    decoder = Decoder(engine, reuse_prefixes=True)
    system = words(50, 9, 320)
    requests = [Request([*system, 5 + i], 10, tree=TREE) for i in range(2)]
    number = decoder.add(requests[0])
    results: dict[int, list[Event]] = {number: decoder.step() + decoder.step(), number + 1: []}
    decoder.add(requests[1])
    while decoder.active:
        for event in decoder.step():
            results[event.id].append(event)
    assert reused(results[number + 1]) == 49
    assert list(map(tokens, results.values())) == [tokens(alone(engine, request)) for request in requests]
