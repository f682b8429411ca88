"""Command line of the serving bench."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from prism_trt.bench.methods import engine_info
from prism_trt.bench.prompts import PROMPTS
from prism_trt.bench.results import write_json
from prism_trt.bench.runner import environment
from prism_trt.bench.serving.deployment import Deployment
from prism_trt.bench.serving.faults import GRACE, SCENARIOS, Bench
from prism_trt.bench.serving.fuzzing import run_fuzzing
from prism_trt.bench.serving.load import run_load
from prism_trt.bench.serving.report import markdown, write_markdown
from prism_trt.bench.serving.results import Fault, ServingResult
from prism_trt.bench.serving.soak import run_soak
from prism_trt.bench.serving.streams import expected_answers
from prism_trt.client.generate import Options
from prism_trt.engines.manifest import read_engine_manifest
from prism_trt.errors import PrismError
from prism_trt.progress import progress

EngineOption = Annotated[Path, typer.Option(help="Engine directory.")]
JsonOption = Annotated[Path, typer.Option("--json", help="Where the result is written.")]
MarkdownOption = Annotated[Path | None, typer.Option("--markdown", help="Where tables are written.")]
TokensOption = Annotated[int, typer.Option(min=2, help="Longest answer, in tokens.")]
PatienceOption = Annotated[
    float, typer.Option(min=1, help="Seconds a start, a recovery or the next piece of an answer may take.")
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Engine threads. Default: the engine's choice.")]
LogOption = Annotated[Path | None, typer.Option("--log", help="File for the logs of the servers.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the broken requests.")]


def app() -> typer.Typer:
    """The `bench.serving` commands."""
    command = typer.Typer(add_completion=False, help="A served engine under load and under faults; loopback only.")
    command.command()(load)
    command.command()(faults)
    command.command()(fuzz)
    command.command()(soak)
    return command


def load(
    engine: EngineOption,
    json_path: JsonOption,
    streams: Annotated[
        list[int] | None, typer.Option(min=1, help="Clients; may be repeated. Default: 1, 8, 32.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Length of each run.")] = 60.0,
    tokens: TokensOption = 64,
    threads: ThreadsOption = None,
    patience: PatienceOption = 120.0,
    markdown_path: MarkdownOption = None,
    log: LogOption = None,
) -> None:
    """Measure latency and throughput with several numbers of clients that ask all the time."""
    session = _Session(engine, tokens, threads, patience, log)
    counts = streams or [1, 8, 32]
    with session.serving() as deployment, progress("Loading the server", total=len(counts)) as bar:
        expected = session.expected(deployment)
        points = []
        for count in counts:
            points.append(asyncio.run(run_load(deployment, count, seconds, session.options, expected)))
            bar.advance()
    session.finish({"load": tuple(points)}, json_path, markdown_path)
    _refuse(sum(point.outcomes.lost for point in points), sum(point.different for point in points))


def faults(
    engine: EngineOption,
    json_path: JsonOption,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(SCENARIOS)}; may be repeated. Default: all.")
    ] = None,
    hang_timeout: Annotated[float, typer.Option(min=1, help="That of the deployments.")] = 20.0,
    tokens: TokensOption = 32,
    threads: ThreadsOption = None,
    patience: PatienceOption = 120.0,
    markdown_path: MarkdownOption = None,
    log: LogOption = None,
) -> None:
    """Kill, stop and hang every process of a deployment under load, and check what clients get."""
    if unknown := set(only or ()) - SCENARIOS.keys():
        raise PrismError(f"there is no fault {sorted(unknown)[0]!r}: choose from {', '.join(SCENARIOS)}")
    session = _Session(engine, tokens, threads, patience, log, hang_timeout)
    with session.serving() as deployment:
        expected = session.expected(deployment)
    bench = Bench(session.deployment, session.slots, session.options, expected, patience)
    found: list[Fault] = []
    names = only or list(SCENARIOS)
    with progress("Breaking the server", total=len(names)) as bar:
        for name in names:
            bar.describe(name)
            found.append(asyncio.run(SCENARIOS[name](bench)))
            bar.advance()
    session.finish({"faults": tuple(found)}, json_path, markdown_path)
    if failed := [fault.name for fault in found if not fault.passed]:
        raise PrismError(f"not as expected: {', '.join(failed)}; see {json_path}")


def fuzz(
    engine: EngineOption,
    json_path: JsonOption,
    requests: Annotated[int, typer.Option(min=1, help="Broken requests.")] = 10_000,
    seed: SeedOption = 0,
    tokens: TokensOption = 16,
    threads: ThreadsOption = None,
    patience: PatienceOption = 120.0,
    markdown_path: MarkdownOption = None,
    log: LogOption = None,
) -> None:
    """Send broken requests while others keep asking properly."""
    session = _Session(engine, tokens, threads, patience, log)
    with session.serving() as deployment, progress("Broken requests", total=requests) as bar:
        expected = session.expected(deployment)
        run = run_fuzzing(deployment, requests, seed, session.options, expected, bar.advance)
        fuzzing = asyncio.run(run)
    session.finish({"fuzzing": fuzzing}, json_path, markdown_path)
    _refuse(fuzzing.valid.lost + sum(kind.silent for kind in fuzzing.kinds.values()), fuzzing.different)


def soak(
    engine: EngineOption,
    json_path: JsonOption,
    minutes: Annotated[float, typer.Option(min=0.1, help="Length of the run.")] = 30.0,
    streams: Annotated[int, typer.Option(min=1, help="Clients that ask all the time.")] = 8,
    broken_seconds: Annotated[
        float, typer.Option(min=0, help="From one broken request to the next; 0 sends none.")
    ] = 1.0,
    seed: SeedOption = 0,
    tokens: TokensOption = 48,
    threads: ThreadsOption = None,
    patience: PatienceOption = 120.0,
    markdown_path: MarkdownOption = None,
    log: LogOption = None,
) -> None:
    """Serve for long: answers, cancelled streams and broken requests, with memory watched."""
    session = _Session(engine, tokens, threads, patience, log)
    with session.serving() as deployment, progress("Soaking, in seconds", total=60 * minutes) as bar:
        expected = session.expected(deployment)
        run = run_soak(deployment, streams, 60 * minutes, broken_seconds, seed, session.options, expected, bar.advance)
        result = asyncio.run(run)
    session.finish({"soak": result}, json_path, markdown_path)
    _refuse(result.outcomes.lost, result.different)


class _Session:
    """What all commands share: an engine, how it is deployed, and what is written down at the end."""

    def __init__(
        self,
        engine: Path,
        tokens: int,
        threads: int | None,
        patience: float,
        log: Path | None,
        hang_timeout: float | None = None,
    ) -> None:
        # However the bench is ended, its deployments are ended too.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        self.slots = read_engine_manifest(engine).limits.slots
        self.options = Options(max_tokens=tokens, timeout=patience)
        self._engine = engine
        self._threads = threads
        self._patience = patience
        self._log = log
        self._hang_timeout = patience if hang_timeout is None else hang_timeout
        self._load_average = os.getloadavg()[0]
        self._start_seconds = 0.0
        self._scratch = tempfile.TemporaryDirectory()

    def deployment(self, ports: tuple[int, int, int, int] | None = None) -> Deployment:
        """Launch one."""
        options = ["--grace", str(GRACE), "--hang-timeout", str(self._hang_timeout)]
        if self._threads is not None:
            options += ["--threads", str(self._threads)]
        if self._log is not None:
            options += ["--log", str(self._log)]
        repository = Path(self._scratch.name) / "repository"
        return Deployment(self._engine, repository, self._patience, tuple(options), ports)

    @contextmanager
    def serving(self) -> Iterator[Deployment]:
        """A deployment that serves."""
        with self.deployment() as deployment:
            self._start_seconds = deployment.start_seconds
            yield deployment

    def expected(self, deployment: Deployment) -> dict[str, str]:
        """The answers to the built-in prompts, one at a time."""
        return asyncio.run(expected_answers(deployment.grpc_url, PROMPTS, self.options))

    def finish(self, found: dict[str, Any], json_path: Path, markdown_path: Path | None) -> None:
        """Write the result and show its tables."""
        result = ServingResult(
            command=shlex.join(["python", "-m", "prism_trt.bench.serving", *sys.argv[1:]]),
            engine=engine_info(self._engine, self._threads),
            environment=environment(),
            processors=os.cpu_count() or 1,
            load_average=self._load_average,
            niceness=os.nice(0),
            slots=self.slots,
            answer_tokens=self.options.max_tokens,
            start_seconds=self._start_seconds,
            **found,
        )
        write_json(result, json_path)
        if markdown_path is not None:
            write_markdown(result, markdown_path)
        typer.echo(markdown(result))
        self._scratch.cleanup()


def _refuse(lost: int, different: int) -> None:
    if lost or different:
        raise PrismError(f"{lost} requests were lost and {different} answers differed: see the result")
