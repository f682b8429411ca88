"""One thread that runs everybody's requests on one decoder."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Literal, Protocol

from prism_trt.deploy.fair_queue import INPUT_WEIGHT, OUTPUT_WEIGHT, FairQueue
from prism_trt.deploy.interface import TRY_AGAIN, Fault
from prism_trt.deploy.requests import Generation
from prism_trt.engines.protocol import Engine
from prism_trt.errors import PrismError
from prism_trt.speculative.decoder import Decoder
from prism_trt.speculative.log_probs import ScoredToken
from prism_trt.speculative.planner import Planner
from prism_trt.speculative.request import Event, Statistics, check_request
from prism_trt.speculative.stopping import FinishReason, TextStream
from prism_trt.target.detokenize import DetokenizerStream
from prism_trt.target.tokenizer import Tokenizer

Cause = Literal["overload", "late", "cancelled", "stopping", "engine", "connection"]
"""Why a valid request ends without its answer."""

_WAITING_POLL_SECONDS = 0.05
"""Between two looks at all waiting requests; those that run are looked at before every round."""
_REPORT_SECONDS = 0.2
"""Between two reports of the occupancy while requests run."""
_JOIN_SECONDS = 10.0
_ERRORS: dict[Cause, tuple[Fault, str]] = {
    "overload": ("unavailable", f"{{}} requests are running or waiting already: {TRY_AGAIN}"),
    "late": ("unavailable", f"the request timed out before its first token: {TRY_AGAIN}"),
    "stopping": ("unavailable", "the server is shutting down: try another"),
    "engine": ("internal", "the engine failed: see the server's log"),
    "connection": ("internal", "a response could not be sent"),
}

log = logging.getLogger(__name__)


class Reply(Protocol):
    """Where one request's answer goes. Called by the scheduler's thread, and by `Scheduler.submit` for a refusal."""

    def text(self, text: str, scored: list[ScoredToken]) -> None:
        """Send a piece of text and the tokens since the last one, if they are scored; more follows."""
        ...

    def finish(self, text: str, scored: list[ScoredToken], reason: FinishReason, statistics: Statistics) -> None:
        """Send the last piece."""
        ...

    def fail(self, fault: Fault, sentence: str) -> None:
        """Send an error instead of anything further."""
        ...

    def cancelled(self) -> bool:
        """The client has gone or does not want the rest of the answer."""
        ...


@dataclass(frozen=True)
class Occupancy:
    """What the scheduler holds."""

    running: int = 0
    """Requests with a slot."""
    waiting: int = 0
    cached_slots: int = 0
    """Slots without a request that hold K/V for later ones."""
    empty_slots: int = 0


class Monitor(Protocol):
    """Told what happens, by the scheduler's thread. Times are in seconds."""

    def occupancy(self, occupancy: Occupancy) -> None:
        """What the scheduler holds has changed."""
        ...

    def started(self, waited: float) -> None:
        """A request has got a slot after `waited`."""
        ...

    def first_token(self, waited: float) -> None:
        """A request has its first token, `waited` after it came."""
        ...

    def round(self, gap: float) -> None:
        """Running requests got further tokens, at most `gap` after those before."""
        ...

    def finished(self, reason: FinishReason, statistics: Statistics) -> None:
        """A request has ended well."""
        ...

    def failed(self, cause: Cause) -> None:
        """A valid request has ended without its answer; may be called by any thread."""
        ...


class Silent:
    """A `Monitor` that does nothing."""

    def occupancy(self, occupancy: Occupancy) -> None: ...

    def started(self, waited: float) -> None: ...

    def first_token(self, waited: float) -> None: ...

    def round(self, gap: float) -> None: ...

    def finished(self, reason: FinishReason, statistics: Statistics) -> None: ...

    def failed(self, cause: Cause) -> None: ...


@dataclass(eq=False)
class _Job:
    generation: Generation
    reply: Reply
    deadline: float
    """By when (`time.monotonic`) the first token must have been made."""
    stream: TextStream
    text: str
    """Made and not sent yet."""
    scored: list[ScoredToken] = field(default_factory=list)
    """Likewise."""
    submitted: float = field(default_factory=time.monotonic)
    delivered: float | None = None
    """When the last tokens came."""

    @property
    def given_up(self) -> Cause | None:
        """Why nobody waits for the answer any more; None while somebody does."""
        if self.delivered is None and time.monotonic() > self.deadline:
            return "late"
        return "cancelled" if self.reply.cancelled() else None


class Scheduler:
    """Continuous batching of requests from many threads.

    Requests wait in a `FairQueue` until the engine has a slot for them.

    Args:
        engine: runs them; used by the scheduler's thread only.
        tokenizer: the target's.
        backlog: requests that may wait.
        prefill_tokens: see `Decoder`.
        reuse_prefixes: see `Decoder`.
        monitor: told what happens.
        planner: see `Decoder`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        backlog: int,
        prefill_tokens: int | None = None,
        reuse_prefixes: bool = True,
        monitor: Monitor | None = None,
        planner: Planner | None = None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._limit = engine.limits.slots + backlog
        self._monitor = monitor or Silent()
        self._new_decoder = lambda: Decoder(engine, tokenizer, prefill_tokens, reuse_prefixes, planner)
        self._decoder = self._new_decoder()
        self._changed = threading.Condition()
        """Guards what follows."""
        self._waiting: FairQueue[_Job] = FairQueue()
        self._running: dict[int, _Job] = {}
        """By the decoder's numbers; changed by the scheduler's thread only."""
        self._stopping = False
        self._polled = 0.0
        self._reported = Occupancy(), 0.0
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, generation: Generation, reply: Reply, timeout: float | None = None) -> None:
        """Queue a request; `timeout` limits the seconds until its first token. Thread-safe, returns at once.

        When too many wait, the newest request of the user with most of them is refused.
        """
        request = generation.request
        try:
            check_request(request, self._engine, self._tokenizer)
        except PrismError as error:
            reply.fail("invalid", str(error))
            return
        stream = TextStream(DetokenizerStream(self._tokenizer), request.stop_words, request.eos_token_ids)
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        job = _Job(generation, reply, deadline, stream, generation.prefix)
        with self._changed:
            stopping, held = self._stopping, len(self._running) + len(self._waiting)
            refused: _Job | None = None
            if stopping or held >= self._limit:
                refused = (None if stopping else self._waiting.displace(generation.user)) or job
            if refused is not job:
                self._waiting.push(generation.user, job)
                self._changed.notify()
        if refused is not None:
            self._fail(refused.reply, "stopping" if stopping else "overload", held)

    def stop(self) -> None:
        """End the thread; requests that have not finished get an error. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._sleep()
                self._drop()
                self._admit()
                self._report()
                self._deliver(self._decoder.step())
            except Exception:
                # Whatever it was, it must not end the thread: later requests may well succeed.
                log.exception("the engine failed")
                self._fail_running("engine")
                self._decoder = self._new_decoder()
        self._fail_running("stopping")
        while (waiting := self._next()) is not None:
            self._fail(waiting[1].reply, "stopping")

    def _sleep(self) -> None:
        """Wait until there is something to do."""
        self._report()
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._running or self._waiting)

    def _drop(self) -> None:
        """Give up requests that nobody waits for any more."""
        for number, job in list(self._running.items()):
            if (cause := job.given_up) is not None:
                statistics = self._decoder.cancel(number)
                del self._running[number]
                self._give_up(job, cause, statistics)
        if time.monotonic() - self._polled < _WAITING_POLL_SECONDS:
            return
        with self._changed:
            waiting = list(self._waiting)
        for user, job in waiting:
            if (cause := job.given_up) is not None:
                with self._changed:
                    waited = self._waiting.remove(user, job)
                if waited:
                    self._give_up(job, cause)
        self._polled = time.monotonic()

    def _admit(self) -> None:
        """Start as many waiting requests as there are slots for."""
        while not self._stopping and self._decoder.room and (entry := self._next()) is not None:
            user, job = entry
            try:
                if (cause := job.given_up) is not None:  # before it costs a prefill
                    self._give_up(job, cause)
                    continue
                self._running[self._decoder.add(job.generation.request)] = job
            except Exception:
                # It is in neither list, so nobody else would answer it.
                log.exception("a request could not be started")
                self._fail(job.reply, "engine")
                continue
            self._charge(user, INPUT_WEIGHT * len(job.generation.request.prompt))
            self._monitor.started(time.monotonic() - job.submitted)

    def _next(self) -> tuple[str, _Job] | None:
        with self._changed:
            return self._waiting.pop()

    def _charge(self, user: str, cost: int) -> None:
        with self._changed:
            self._waiting.charge(user, cost)

    def _deliver(self, events: list[Event]) -> None:
        now = time.monotonic()
        jobs = [self._running[event.id] for event in events]
        if gaps := [now - job.delivered for job in jobs if job.delivered is not None]:
            self._monitor.round(max(gaps))
        for event, job in zip(events, jobs, strict=True):
            if job.delivered is None:
                self._monitor.first_token(now - job.submitted)
            job.delivered = now
            self._charge(job.generation.user, OUTPUT_WEIGHT * len(event.tokens))
            self._send(job, event)

    def _give_up(self, job: _Job, cause: Cause, statistics: Statistics | None = None) -> None:
        """End a request that nobody waits for; `statistics` of one that had a slot."""
        if cause != "cancelled":
            self._fail(job.reply, cause)
            return
        self._monitor.failed(cause)
        self._finish(job, "cancelled", statistics or Statistics(len(job.generation.request.prompt)))

    def _finish(self, job: _Job, reason: FinishReason, statistics: Statistics) -> None:
        try:
            job.reply.finish(job.text + job.stream.flush(), job.scored, reason, statistics)
        except Exception:
            log.exception("a last response could not be sent")

    def _send(self, job: _Job, event: Event) -> None:
        job.text += job.stream.push(event.tokens)
        job.scored += event.scored
        if event.finish_reason is not None and event.stats is not None:
            del self._running[event.id]
            self._monitor.finished(event.finish_reason, event.stats)
            self._finish(job, event.finish_reason, event.stats)
        elif job.generation.stream and job.text:
            text, scored, job.text, job.scored = job.text, job.scored, "", []
            try:
                job.reply.text(text, scored)
            except Exception:
                log.exception("a response could not be sent")
                self._decoder.cancel(event.id)
                del self._running[event.id]
                self._fail(job.reply, "connection")

    def _report(self) -> None:
        """Tell the monitor the occupancy, not too often but always when nothing is left or the first request starts.

        The step that follows may hang.
        """
        with self._changed:
            running, waiting = len(self._running), len(self._waiting)
        cached = self._decoder.cached_slots
        occupancy = Occupancy(running, waiting, cached, self._engine.limits.slots - running - cached)
        last, when = self._reported
        now = time.monotonic()
        if occupancy != last and (now - when > _REPORT_SECONDS or not (running and last.running)):
            self._reported = occupancy, now
            self._monitor.occupancy(occupancy)

    def _fail_running(self, cause: Cause) -> None:
        jobs = list(self._running.values())
        self._running.clear()
        for job in jobs:
            self._fail(job.reply, cause)

    def _fail(self, reply: Reply, cause: Cause, detail: object = None) -> None:
        """Send an error as a request's last response, whatever becomes of it; `detail` completes its sentence."""
        fault, sentence = _ERRORS[cause]
        self._monitor.failed(cause)
        try:
            reply.fail(fault, sentence.format(detail))
        except Exception:
            log.exception("a last response could not be sent")
