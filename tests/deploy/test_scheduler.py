"""The scheduler without Triton: faults, refusals, shutdown."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from prism_trt.deploy.requests import Generation
from prism_trt.deploy.scheduler import Fault, Scheduler
from prism_trt.engines.protocol import EngineLimits, LogitsFor, TargetOutput, TokenBatch
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.speculative.decoder import Request, Statistics, generate
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

    def forward(self, batch: TokenBatch, logits_for: LogitsFor = "all") -> TargetOutput:
        assert self.go.wait(60)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("out of memory at 0x1234")
        return super().forward(batch, logits_for)


class Recorder:
    """A reply that remembers."""

    def __init__(self, break_after: int | None = None) -> None:
        self.pieces: list[str] = []
        self.ended = threading.Event()
        self.reason: FinishReason | None = None
        self.statistics: Statistics | None = None
        self.failure: tuple[Fault, str] | None = None
        self.gone = False
        self._break_after = break_after

    def text(self, text: str) -> None:
        if self._break_after == len(self.pieces):
            raise OSError("the pipe is gone")
        self.pieces.append(text)

    def finish(self, text: str, reason: FinishReason, statistics: Statistics) -> None:
        self.pieces.append(text)
        self.reason, self.statistics = reason, statistics
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


def generation(engine: TorchEngine, max_tokens: int = 10, stream: bool = True, prefix: str = "") -> Generation:
    return Generation(Request([5, 6, 7], max_tokens, tree=engine.default_tree), stream, prefix)


def submit(scheduler: Scheduler, wanted: Generation, reply: Recorder | None = None) -> Recorder:
    reply = reply or Recorder()
    scheduler.submit(wanted, reply)
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
    time.sleep(0.06)
    engine.go.set()
    for reply in replies:
        assert reply.ended.wait(60)
        assert reply.failure == ("unavailable", "cancelled")
        assert sum(map(len, reply.pieces)) < len(whole)


def test_stop_answers_everybody(engine: FragileEngine, scheduler: Scheduler) -> None:
    engine.go.clear()
    replies = [submit(scheduler, generation(engine)) for _ in range(3)]
    threading.Timer(0.1, engine.go.set).start()
    scheduler.stop()
    assert all(reply.ended.is_set() for reply in replies)
    late = submit(scheduler, generation(engine))
    assert late.failure == ("unavailable", "the server is shutting down: try another")
    scheduler.stop()
