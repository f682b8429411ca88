"""Break a deployment under load and see what its clients notice, and for how long."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from prism_trt.bench.serving.deployment import Deployment, Role, command_of
from prism_trt.bench.serving.results import Fault
from prism_trt.bench.serving.streams import Attempt, ask, connect, count
from prism_trt.client.generate import Options
from prism_trt.errors import PrismError

_LONG = 1500
"""Tokens of an answer that is still running when the fault comes."""
_POLL_SECONDS, _ARRIVAL_SECONDS, _DRAIN_MARGIN_SECONDS = 0.1, 1.0, 5.0
GRACE = 10.0
"""Seconds that open requests get; every deployment of the bench is started with it."""


@dataclass
class _Findings:
    """What a scenario notes down on the way."""

    name: str
    attempts: list[Attempt] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def expect(self, condition: bool, sentence: str) -> None:
        if not condition:
            self.problems.append(sentence)

    def ended(self, attempts: Sequence[Attempt], since: float) -> None:
        """Note requests that were open when the fault came, at `since`, and have ended."""
        self.attempts += attempts
        self.figures["last open request failed after"] = max(attempt.ended for attempt in attempts) - since

    def result(self) -> Fault:
        outcomes = count(self.attempts)
        self.expect(not outcomes.lost, f"{outcomes.lost} requests got neither an answer nor an error")
        return Fault(
            name=self.name,
            passed=not self.problems,
            outcomes=outcomes,
            figures=self.figures,
            problems=tuple(self.problems),
        )


@dataclass(frozen=True)
class Bench:
    """What every scenario needs.

    Args:
        start: launches a deployment; ports may be given to use those of another.
        slots: requests decoded together.
        options: of ordinary requests.
        expected: their prompts and answers.
        recovery_seconds: longest wait for a server to come back.
    """

    start: Callable[[tuple[int, int, int, int] | None], Deployment]
    slots: int
    options: Options
    expected: Mapping[str, str]
    recovery_seconds: float

    @property
    def prompt(self) -> str:
        """One prompt."""
        return next(iter(self.expected))

    @property
    def long(self) -> Options:
        """Options of an answer that does not end by itself."""
        return Options(model=self.options.model, max_tokens=_LONG, timeout=self.options.timeout)


class _Load:
    """Long answers in the slots, and further requests that wait for one; an async context manager."""

    def __init__(self, bench: Bench, url: str, running: int, waiting: int = 0) -> None:
        self._bench = bench
        self._client = connect(url)
        self._counts = running, waiting
        self._tasks: list[asyncio.Task[Attempt]] = []

    async def __aenter__(self) -> _Load:
        running, waiting = self._counts
        await asyncio.gather(
            *(asyncio.wait_for(event.wait(), self._bench.options.timeout) for event in self._ask(running))
        )
        self._ask(waiting)
        await asyncio.sleep(_ARRIVAL_SECONDS)
        return self

    def _ask(self, requests: int) -> list[asyncio.Event]:
        """Send requests; returns an event for the first text of each."""
        events = [asyncio.Event() for _ in range(requests)]
        for event in events:
            attempt = ask(self._client, self._bench.prompt, self._bench.long, to_the_limit=True, first=event)
            self._tasks.append(asyncio.create_task(attempt))
        return events

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    async def ended(self) -> list[Attempt]:
        """All attempts, when the last has ended."""
        return await asyncio.gather(*self._tasks)


Scenario = Callable[[Bench], Coroutine[Any, Any, Fault]]


async def client_killed(bench: Bench) -> Fault:
    """A client is killed in the middle of its answer; its slot must go to the request that waits."""
    found = _Findings("client killed")
    with bench.start(None) as deployment:
        async with _Load(bench, deployment.grpc_url, bench.slots - 1):
            context = multiprocessing.get_context("spawn")
            reader, writer = context.Pipe(duplex=False)
            arguments = (deployment.grpc_url, bench.prompt, bench.long, writer)
            process = context.Process(target=_read_until_killed, args=arguments, daemon=True)
            process.start()
            await asyncio.to_thread(reader.recv)
            client = connect(deployment.grpc_url)
            waiting = asyncio.create_task(
                ask(client, bench.prompt, Options(**{**vars(bench.options), "max_tokens": 1}))
            )
            await asyncio.sleep(1.0)
            found.expect(not waiting.done(), "the request got a slot although all were taken")
            killed = time.perf_counter()
            process.kill()
            attempt = await waiting
            process.join()
            await client.close()
            found.attempts.append(attempt)
            found.expect(attempt.outcome == "answers", f"the waiting request ended as {attempt.outcome}")
            found.figures["slot freed and first token made after"] = attempt.ended - killed
        await _check_answers(bench, deployment, found)
    return found.result()


def _read_until_killed(url: str, prompt: str, options: Options, told: Connection) -> None:
    """A client process that tells when its answer has begun."""

    async def read() -> None:
        first = asyncio.Event()
        task = asyncio.create_task(ask(connect(url), prompt, options, to_the_limit=True, first=first))
        await first.wait()
        told.send("begun")
        await task

    asyncio.run(read())


def killed(role: Role) -> Scenario:
    """A process of the deployment is killed; open requests fail, and the launcher brings the server back."""

    async def run(bench: Bench) -> Fault:
        found = _Findings(f"{role} killed")
        with bench.start(None) as deployment:
            processes = deployment.processes()
            async with _Load(bench, deployment.grpc_url, bench.slots, bench.slots) as load:
                at = time.perf_counter()
                os.kill(processes[role], signal.SIGKILL)
                found.ended(await load.ended(), at)
            await _await_red(bench, deployment, found, at)
            await _recover(bench, deployment, found, at)
            left = [pid for pid in processes.values() if command_of(pid)]
            found.expect(not left, f"processes of the former server remain: {left}")
        _expect_nothing_left(deployment, found)
        return found.result()

    return run


async def model_hangs(bench: Bench) -> Fault:
    """The model process is stopped: Triton stays green, the readiness endpoint does not, and the server is replaced."""
    found = _Findings("model hangs")
    with bench.start(None) as deployment:
        async with _Load(bench, deployment.grpc_url, bench.slots, bench.slots) as load:
            at = time.perf_counter()
            os.kill(deployment.processes()["model"], signal.SIGSTOP)
            await _await_red(bench, deployment, found, at)
            found.ended(await load.ended(), at)
        await _recover(bench, deployment, found, at)
    _expect_nothing_left(deployment, found)
    return found.result()


async def launcher_killed(bench: Bench) -> Fault:
    """The launcher is killed: open requests fail, nothing remains, and the next start takes the same ports."""
    found = _Findings("launcher killed")
    deployment = bench.start(None)
    with deployment:
        processes = deployment.processes()
        async with _Load(bench, deployment.grpc_url, bench.slots, bench.slots) as load:
            at = time.perf_counter()
            deployment.launcher.kill()
            found.ended(await load.ended(), at)
    while any(command_of(pid) for pid in processes.values()) and time.perf_counter() - at < bench.recovery_seconds:
        await asyncio.sleep(_POLL_SECONDS)
    found.figures["all processes gone after"] = time.perf_counter() - at
    _expect_nothing_left(deployment, found)
    with bench.start(deployment.ports) as following:
        await _check_answers(bench, following, found)
    return found.result()


async def launcher_and_keeper_killed(bench: Bench) -> Fault:
    """Nobody is left to clean up; the next start does."""
    found = _Findings("launcher and keeper killed")
    deployment = bench.start(None)
    with deployment:
        processes = deployment.processes()
        async with _Load(bench, deployment.grpc_url, bench.slots, bench.slots) as load:
            at = time.perf_counter()
            os.kill(processes["keeper"], signal.SIGSTOP)
            deployment.launcher.kill()
            os.kill(processes["keeper"], signal.SIGKILL)
            found.ended(await load.ended(), at)
    found.figures["regions left behind (number)"] = len(deployment.shared_memory())
    with bench.start(deployment.ports) as following:
        _expect_nothing_left(deployment, found)
        found.expect(not any(command_of(pid) for pid in processes.values()), "processes of the former server remain")
        await _check_answers(bench, following, found)
    return found.result()


async def drained(bench: Bench) -> Fault:
    """SIGTERM under load: short answers are completed, long ones end with an error, new requests are refused."""
    found = _Findings("SIGTERM under load")
    deployment = bench.start(None)
    with deployment:
        processes = deployment.processes()
        client = connect(deployment.grpc_url)
        async with _Load(bench, deployment.grpc_url, bench.slots // 2) as load:
            events = [asyncio.Event() for _ in range(bench.slots - bench.slots // 2)]
            short = [asyncio.create_task(ask(client, bench.prompt, bench.options, first=event)) for event in events]
            await asyncio.gather(*(event.wait() for event in events))
            at = time.perf_counter()
            deployment.launcher.terminate()
            await asyncio.sleep(0.5)
            late = await ask(client, bench.prompt, bench.options)
            finished = await asyncio.gather(*short)
            long = await load.ended()
        await client.close()
        code = await asyncio.to_thread(deployment.launcher.wait)
        found.figures["launcher ended after"] = time.perf_counter() - at
    found.attempts += [*finished, late]
    found.figures["short answers completed (number)"] = sum(attempt.outcome == "answers" for attempt in finished)
    found.figures["short answers open (number)"] = len(finished)
    found.expect(late.outcome == "refused", f"a request after the signal ended as {late.outcome}")
    found.expect(
        all(a.outcome == "failed" or a.text == bench.expected[bench.prompt] for a in finished),
        "an answer that ended well was not whole",
    )
    found.expect(all(attempt.outcome == "failed" for attempt in long), "a long answer did not end with an error")
    found.expect(code == 0, f"the launcher's exit code was {code}")
    found.ended(long, at)
    found.expect(
        found.figures["last open request failed after"] < GRACE + _DRAIN_MARGIN_SECONDS,
        "requests outlived the grace period",
    )
    found.expect(not any(command_of(pid) for pid in processes.values()), "processes remain")
    _expect_nothing_left(deployment, found)
    return found.result()


async def _await_red(bench: Bench, deployment: Deployment, found: _Findings, since: float) -> None:
    """Wait until the readiness endpoint says that the model does not work."""
    while deployment.ready():
        if time.perf_counter() - since > bench.recovery_seconds:
            found.problems.append("the readiness endpoint stayed green")
            return
        await asyncio.sleep(_POLL_SECONDS)
    found.figures["readiness flipped within"] = time.perf_counter() - since


async def _recover(bench: Bench, deployment: Deployment, found: _Findings, since: float) -> None:
    """Wait until the server is back, and check its answers."""
    try:
        back = await asyncio.to_thread(deployment.await_line, "serving again", bench.recovery_seconds)
    except PrismError as error:
        found.problems.append(f"the server did not come back: {error}")
        return
    found.figures["serving again after"] = back - since
    found.expect(deployment.ready(), "the readiness endpoint did not turn green again")
    await _check_answers(bench, deployment, found)


async def _check_answers(bench: Bench, deployment: Deployment, found: _Findings) -> None:
    client = connect(deployment.grpc_url)
    attempts = [await ask(client, prompt, bench.options) for prompt in bench.expected]
    await client.close()
    found.attempts += attempts
    same = [attempt.text for attempt in attempts] == list(bench.expected.values())
    found.expect(same, "answers afterwards differ from those before")


def _expect_nothing_left(deployment: Deployment, found: _Findings) -> None:
    directories = list(Path(tempfile.gettempdir()).glob(f"prism_trt_{deployment.launcher.pid}_*"))
    left = [*deployment.shared_memory(), *directories]
    found.expect(not left, f"files remain: {left}")


SCENARIOS: dict[str, Scenario] = {
    "client": client_killed,
    "model": killed("model"),
    "server": killed("server"),
    "keeper": killed("keeper"),
    "hang": model_hangs,
    "launcher": launcher_killed,
    "launcher-keeper": launcher_and_keeper_killed,
    "drain": drained,
}
