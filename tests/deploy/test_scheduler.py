"""The scheduler without Triton: faults, refusals, shutdown."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch

from prism_trt.deploy.requests import Generation
from prism_trt.deploy.scheduler import Fault, Occupancy, Scheduler, Silent
from prism_trt.engines.protocol import EngineLimits, LogitsFor, TargetOutput, TokenBatch
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.speculative.decoder import generate
from prism_trt.speculative.log_probs import ScoredToken
from prism_trt.speculative.request import Request, Statistics
from prism_trt.speculative.stopping import FinishReason
from tests.tiny import tiny_drafter, tiny_target, tiny_tokenizer

LIMITS = EngineLimits(slots=2, context=128, tokens_per_call=64)


class FragileEngine(TorchEngine):
    """Fails on demand and can be held."""

    fail_next = False

    def __init__(self) -> None:
        target = tiny_target()
        super().__init__(target, tiny_drafter(target), LIMITS, torch.device("cpu"), torch.float32)
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()
        self.seen: set[int] = set()
        """Tokens that were computed."""

    def forward(self, batch: TokenBatch, logits_for: LogitsFor = "all") -> TargetOutput:
        self.entered.set()
        assert self.go.wait(60)
        self.seen.update(batch.tokens.flatten().tolist())
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("out of memory at 0x1234")
        return super().forward(batch, logits_for)


class Recorder:
    """A reply that remembers."""

    def __init__(self, break_after: int | None = None, leave_after: int | None = None) -> None:
        self.pieces: list[str] = []
        self.scored: list[ScoredToken] = []
        self.ended = threading.Event()
        self.reason: FinishReason | None = None
        self.statistics: Statistics | None = None
        self.failure: tuple[Fault, str] | None = None
        self.gone = False
        self.on_end: Callable[[], object] = lambda: None
        self._break_after = break_after
        self._leave_after = leave_after

    def text(self, text: str, scored: list[ScoredToken]) -> None:
        if self._break_after == len(self.pieces):
            raise OSError("the pipe is gone")
        self.pieces.append(text)
        self.scored += scored
        self.gone = self._leave_after == len(self.pieces)

    def finish(self, text: str, scored: list[ScoredToken], reason: FinishReason, statistics: Statistics) -> None:
        self.pieces.append(text)
        self.scored += scored
        self.reason, self.statistics = reason, statistics
        self.on_end()
        self.ended.set()

    def fail(self, fault: Fault, sentence: str) -> None:
        self.failure = (fault, sentence)
        self.ended.set()

    def cancelled(self) -> bool:
        return self.gone


@pytest.fixture
def engine() -> Iterator[FragileEngine]:
    # Two threads would wait for each other longer than they compute here.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield FragileEngine()
    torch.set_num_threads(threads)


@pytest.fixture
def scheduler(engine: FragileEngine) -> Iterator[Scheduler]:
    running = Scheduler(engine, tiny_tokenizer(), backlog=1)
    yield running
    engine.go.set()
    running.stop()


def generation(
    engine: TorchEngine, max_tokens: int = 10, stream: bool = True, prefix: str = "", user: str = ""
) -> Generation:
    return Generation(Request([5, 6, 7], max_tokens, tree=engine.default_tree), stream, prefix, user)


def submit(
    scheduler: Scheduler, wanted: Generation, reply: Recorder | None = None, timeout: float | None = None
) -> Recorder:
    reply = reply or Recorder()
    scheduler.submit(wanted, reply, timeout)
    return reply


def expected(engine: TorchEngine, wanted: Generation) -> str:
    (result,) = generate(engine, [wanted.request])
    return tiny_tokenizer().decode(result.tokens)


def test_an_engine_failure_ends_its_requests_only(engine: FragileEngine, scheduler: Scheduler) -> None:
    wanted = generation(engine)
    text = expected(engine, wanted)
    for _ in range(2 * LIMITS.slots + 1):
        engine.go.clear()
        engine.fail_next = True
        replies = [submit(scheduler, wanted) for _ in range(3)]
        engine.go.set()
        for reply in replies:
            assert reply.ended.wait(60)
        # The third may have been queued after the failure.
        failures = [reply.failure for reply in replies if reply.failure is not None]
        assert set(failures) == {("internal", "the engine failed: see the server's log")}
        assert replies[0].failure is not None
    after = submit(scheduler, wanted)
    assert after.ended.wait(60)
    assert "".join(after.pieces) == text


def test_a_request_that_cannot_be_started_gets_an_answer(
    engine: FragileEngine, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = generation(engine)
    text = expected(engine, wanted)
    broken = replace(wanted.request, prompt=[5, 6])
    add = scheduler._decoder.add

    def fragile(request: Request) -> int:
        if request is broken:
            raise RuntimeError("no memory for it")
        return add(request)

    monkeypatch.setattr(scheduler._decoder, "add", fragile)
    engine.go.clear()
    running = submit(scheduler, wanted)
    assert engine.entered.wait(60)
    lost, other = submit(scheduler, Generation(broken, True, "")), submit(scheduler, wanted)
    engine.go.set()
    assert all(reply.ended.wait(60) for reply in (running, lost, other))
    assert lost.failure == ("internal", "the engine failed: see the server's log")
    assert "".join(running.pieces) == "".join(other.pieces) == text


def test_a_broken_reply_does_not_disturb_others(engine: FragileEngine, scheduler: Scheduler) -> None:
    wanted = generation(engine)
    text = expected(engine, wanted)
    engine.go.clear()
    broken, good = submit(scheduler, wanted, Recorder(break_after=1)), submit(scheduler, wanted)
    engine.go.set()
    assert broken.ended.wait(60)
    assert good.ended.wait(60)
    assert broken.failure == ("internal", "a response could not be sent")
    assert "".join(good.pieces) == text


def test_backlog(engine: FragileEngine, scheduler: Scheduler) -> None:
    wanted = generation(engine)
    engine.go.clear()
    accepted = [submit(scheduler, wanted) for _ in range(LIMITS.slots + 1)]
    refused = submit(scheduler, wanted)
    assert refused.failure == ("unavailable", "3 requests are running or waiting already: try again later")
    engine.go.set()
    assert all(reply.ended.wait(60) and reply.failure is None for reply in accepted)
    again = submit(scheduler, wanted)
    assert again.ended.wait(60)
    assert again.failure is None


def test_whole_answers_begin_with_the_prefix(engine: FragileEngine, scheduler: Scheduler) -> None:
    wanted = generation(engine, stream=False, prefix="prompt: ")
    reply = submit(scheduler, wanted)
    assert reply.ended.wait(60)
    assert reply.pieces == ["prompt: " + expected(engine, wanted)]
    assert reply.reason == "length"
    assert reply.statistics is not None
    assert reply.statistics.num_output_tokens == 10


def test_a_request_that_can_never_run_is_the_clients_fault(engine: FragileEngine, scheduler: Scheduler) -> None:
    reply = submit(scheduler, Generation(Request([5] * 1000, 1), True, ""))
    assert reply.ended.wait(60)
    assert reply.failure is not None
    assert reply.failure[0] == "invalid"
    assert "1000 tokens" in reply.failure[1]


def test_cancelled_while_waiting_and_while_running(engine: FragileEngine, scheduler: Scheduler) -> None:
    wanted = generation(engine, max_tokens=40)
    whole = expected(engine, wanted)
    engine.go.clear()
    replies = [submit(scheduler, wanted) for _ in range(3)]
    for reply in replies:
        reply.gone = True
    engine.go.set()
    for reply in replies:
        assert reply.ended.wait(60)
        assert (reply.failure, reply.reason) == (None, "cancelled")
        assert sum(map(len, reply.pieces)) < len(whole)
        assert reply.statistics is not None
        assert reply.statistics.num_input_tokens == len(wanted.request.prompt)


def test_no_round_is_run_for_a_client_that_has_gone(engine: FragileEngine, scheduler: Scheduler) -> None:
    reply = submit(scheduler, generation(engine, max_tokens=40), Recorder(leave_after=2))
    assert reply.ended.wait(60)
    assert (reply.failure, reply.reason) == (None, "cancelled")
    assert len(reply.pieces) == 3
    assert reply.pieces[2] == ""


def test_a_request_that_waited_too_long_costs_no_prefill(engine: FragileEngine, scheduler: Scheduler) -> None:
    engine.go.clear()
    running = [submit(scheduler, generation(engine)) for _ in range(LIMITS.slots)]
    prompt = [index for index in range(300, 320) if index not in engine.seen]
    late = submit(scheduler, Generation(Request(prompt, 5), True, ""), timeout=0.02)
    time.sleep(0.03)
    engine.go.set()
    assert all(reply.ended.wait(60) for reply in (*running, late))
    assert late.failure == ("unavailable", "the request timed out before its first token: try again later")
    assert not set(prompt) <= engine.seen


def test_a_flood_delays_another_user_by_no_more_than_what_runs(engine: FragileEngine) -> None:
    scheduler = Scheduler(engine, tiny_tokenizer(), backlog=20)
    engine.go.clear()
    flood = [submit(scheduler, generation(engine, max_tokens=4, user="flood")) for _ in range(12)]
    late = [submit(scheduler, generation(engine, max_tokens=4, user="late")) for _ in range(2)]
    order: list[str] = []
    for name, replies in (("flood", flood), ("late", late)):
        for reply in replies:
            reply.on_end = partial(order.append, name)
    engine.go.set()
    assert all(reply.ended.wait(60) and reply.failure is None for reply in flood + late)
    scheduler.stop()
    # Two of the flood had the slots already.
    assert order.index("late") <= 3
    assert [name for name in order[:7]].count("late") == 2


def test_a_full_backlog_refuses_the_newest_of_the_largest_user(engine: FragileEngine) -> None:
    scheduler = Scheduler(engine, tiny_tokenizer(), backlog=2)
    engine.go.clear()
    flood = [submit(scheduler, generation(engine, user="flood"))]
    assert engine.entered.wait(60)
    flood += [submit(scheduler, generation(engine, user="flood")) for _ in range(3)]
    other = submit(scheduler, generation(engine, user="other"))
    again = submit(scheduler, generation(engine, user="other"))
    overload = ("unavailable", "4 requests are running or waiting already: try again later")
    assert flood[3].failure == again.failure == overload
    engine.go.set()
    assert all(reply.ended.wait(60) and reply.failure is None for reply in (*flood[:3], other))
    scheduler.stop()


class Watcher(Silent):
    """A monitor that remembers."""

    def __init__(self) -> None:
        self.occupancies: list[Occupancy] = []
        self.causes: list[str] = []
        self.times: dict[str, list[float]] = {"started": [], "first": [], "round": []}
        self.statistics: list[Statistics] = []

    def occupancy(self, occupancy: Occupancy) -> None:
        self.occupancies.append(occupancy)

    def started(self, waited: float) -> None:
        self.times["started"].append(waited)

    def first_token(self, waited: float) -> None:
        self.times["first"].append(waited)

    def round(self, gap: float) -> None:
        self.times["round"].append(gap)

    def finished(self, reason: FinishReason, statistics: Statistics) -> None:
        self.statistics.append(statistics)

    def failed(self, cause: str) -> None:
        self.causes.append(cause)


def test_the_monitor_learns_what_happened(engine: FragileEngine) -> None:
    watcher = Watcher()
    scheduler = Scheduler(engine, tiny_tokenizer(), backlog=1, monitor=watcher)
    engine.go.clear()
    replies = [submit(scheduler, generation(engine)) for _ in range(4)]
    time.sleep(0.05)
    assert watcher.occupancies[-1].running > 0  # known although the first step has not ended
    engine.go.set()
    assert all(reply.ended.wait(60) for reply in replies)
    invalid = submit(scheduler, Generation(Request([], 1), True, ""))
    scheduler.stop()
    assert invalid.failure is not None
    assert watcher.causes == ["overload"]
    assert len(watcher.times["started"]) == len(watcher.times["first"]) == len(watcher.statistics) == 3
    # The third waited for a slot, which the held engine did not give.
    assert max(watcher.times["started"]) > 0.04
    assert all(first >= 0.04 for first in watcher.times["first"])
    passes = [statistics.target_passes for statistics in watcher.statistics]
    assert 0 < len(watcher.times["round"]) <= sum(passes)
    for statistics in watcher.statistics:
        assert statistics.passes_by_tree == {engine.default_tree: statistics.target_passes}
        assert sum(statistics.accepted_by_step) == statistics.accepted
    # The same prompt again: all but its last token was there.
    assert [statistics.reused_tokens for statistics in watcher.statistics][2] == 2
    assert watcher.occupancies[-1] == Occupancy(running=0, waiting=0, cached_slots=2, empty_slots=0)


def test_log_probabilities_come_with_the_text(engine: FragileEngine, scheduler: Scheduler) -> None:
    request = replace(generation(engine, max_tokens=20).request, log_probs=1)
    reply = submit(scheduler, Generation(request, True, ""))
    assert reply.ended.wait(60)
    (result,) = generate(engine, [request])
    assert [token.token for token in reply.scored] == result.tokens


def test_stop_answers_everybody(engine: FragileEngine, scheduler: Scheduler) -> None:
    engine.go.clear()
    replies = [submit(scheduler, generation(engine)) for _ in range(3)]
    threading.Timer(0.1, engine.go.set).start()
    scheduler.stop()
    assert all(reply.ended.is_set() for reply in replies)
    late = submit(scheduler, generation(engine))
    assert late.failure == ("unavailable", "the server is shutting down: try another")
    scheduler.stop()
