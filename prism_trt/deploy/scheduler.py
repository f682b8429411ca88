"""One thread that runs everybody's requests on one decoder."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

from prism_trt.deploy.requests import Generation
from prism_trt.engines.protocol import Engine
from prism_trt.errors import PrismError
from prism_trt.speculative.decoder import Decoder, Event, Statistics
from prism_trt.speculative.stopping import FinishReason, TextStream
from prism_trt.target.detokenize import DetokenizerStream
from prism_trt.target.tokenizer import Tokenizer

Fault = Literal["invalid", "unavailable", "internal"]

_CANCEL_POLL_SECONDS = 0.05
_JOIN_SECONDS = 10.0

log = logging.getLogger(__name__)


class Reply(Protocol):
    """Where one request's answer goes. Called by the scheduler's thread, and by `Scheduler.submit` for a refusal."""

    def text(self, text: str) -> None:
        """Send a piece of text; more follows."""
        ...

    def finish(self, text: str, reason: FinishReason, statistics: Statistics) -> None:
        """Send the last piece."""
        ...

    def fail(self, fault: Fault, sentence: str) -> None:
        """Send an error instead of anything further."""
        ...

    def cancelled(self) -> bool:
        """The client has gone or does not want the answer any more."""
        ...


@dataclass
class _Job:
    generation: Generation
    reply: Reply
    deadline: float
    """By when (`time.monotonic`) the first token must have been made."""
    stream: TextStream
    submitted: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    polled: float = 0.0
    text: str = ""


class Scheduler:
    """Continuous batching of requests from many threads.

    Args:
        engine: runs them; used by the scheduler's thread only.
        tokenizer: the target's.
        backlog: requests that may wait for one of the engine's slots.
        on_finish: told of each finished request, with the seconds until its first token.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        backlog: int,
        on_finish: Callable[[Statistics, float], None] = lambda statistics, seconds: None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._limit = engine.limits.slots + backlog
        self._on_finish = on_finish
        self._arrivals: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = 0
        """Requests submitted and not ended."""
        self._stopping = False
        self._decoder = Decoder(engine, tokenizer)
        self._jobs: dict[int, _Job] = {}
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, generation: Generation, reply: Reply, timeout: float | None = None) -> None:
        """Queue a request; `timeout` limits the seconds until its first token. Thread-safe, returns at once."""
        with self._lock:
            refusal = None
            if self._stopping:
                refusal = "the server is shutting down: try another"
            elif self._open >= self._limit:
                refusal = f"{self._open} requests are running or waiting already: try again later"
            else:
                self._open += 1
        if refusal is not None:
            reply.fail("unavailable", refusal)
            return
        request = generation.request
        stream = TextStream(DetokenizerStream(self._tokenizer), request.stop_words, request.eos_token_ids)
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        self._arrivals.put(_Job(generation, reply, deadline, stream, text=generation.prefix))

    def stop(self) -> None:
        """End the thread; requests that have not finished get an error. Idempotent."""
        with self._lock:
            self._stopping = True
        self._arrivals.put(None)
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._admit()
                self._drop()
                for event in self._decoder.step():
                    self._deliver(event)
            except Exception:
                # Whatever it was, it must not end the thread: later requests may well succeed.
                log.exception("the engine failed")
                self._fail_all("internal", "the engine failed: see the server's log")
                self._decoder = Decoder(self._engine, self._tokenizer)
        while not self._arrivals.empty():
            job = self._arrivals.get()
            if job is not None:
                self._end(partial(job.reply.fail, "unavailable", "the server is shutting down: try another"))
        self._fail_all("unavailable", "the server is shutting down: try another")

    def _admit(self) -> None:
        """Take what has arrived; sleep until something does when there is nothing to run."""
        while not self._stopping and (not self._jobs or not self._arrivals.empty()):
            job = self._arrivals.get()
            if job is None:
                return
            try:
                number = self._decoder.add(job.generation.request)
            except PrismError as error:
                self._end(partial(job.reply.fail, "invalid", str(error)))
            else:
                self._jobs[number] = job

    def _drop(self) -> None:
        """Give up requests that nobody waits for any more."""
        now = time.monotonic()
        for number, job in list(self._jobs.items()):
            if now - job.polled < _CANCEL_POLL_SECONDS:
                continue
            job.polled = now
            late = job.first_token is None and now > job.deadline
            if late or job.reply.cancelled():
                self._decoder.cancel(number)
                del self._jobs[number]
                sentence = "the request timed out before its first token: try again later" if late else "cancelled"
                self._end(partial(job.reply.fail, "unavailable", sentence))

    def _deliver(self, event: Event) -> None:
        job = self._jobs[event.id]
        if job.first_token is None:
            job.first_token = time.monotonic()
        job.text += job.stream.push(event.tokens)
        if event.finish_reason is not None and event.stats is not None:
            text, reason, statistics = job.text + job.stream.flush(), event.finish_reason, event.stats
            del self._jobs[event.id]
            self._end(lambda: job.reply.finish(text, reason, statistics))
            self._on_finish(statistics, job.first_token - job.submitted)
        elif job.generation.stream and job.text:
            text, job.text = job.text, ""
            try:
                job.reply.text(text)
            except Exception:
                log.exception("a response could not be sent")
                self._decoder.cancel(event.id)
                del self._jobs[event.id]
                self._end(lambda: job.reply.fail("internal", "a response could not be sent"))

    def _fail_all(self, fault: Fault, sentence: str) -> None:
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            self._end(partial(job.reply.fail, fault, sentence))

    def _end(self, last: Callable[[], None]) -> None:
        """Send a request's last response, whatever becomes of it, and forget the request."""
        with self._lock:
            self._open -= 1
        try:
            last()
        except Exception:
            log.exception("a last response could not be sent")
