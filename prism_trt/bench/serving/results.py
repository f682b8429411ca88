"""The JSON of the serving bench."""

from __future__ import annotations

from pydantic import Field

from prism_trt.bench.results import EngineInfo, Environment
from prism_trt.config import StrictModel


class Percentiles(StrictModel):
    """Of a sample of seconds."""

    p50: float
    p99: float
    count: int = Field(description="size of the sample")


class Memory(StrictModel):
    """Of a deployment, in bytes."""

    server: int = Field(description="resident memory of the server process")
    model: int = Field(description="resident memory of the model process")
    shared: int = Field(description="shared memory regions of both")


class Outcomes(StrictModel):
    """How requests ended, as their clients saw it."""

    answers: int = 0
    refused: int = Field(0, description="with an error before the first text")
    failed: int = Field(0, description="with an error after it")
    vanished: int = Field(0, description="without an end and without an error")
    silent: int = Field(0, description="not at all within the patience of the client")

    @property
    def lost(self) -> int:
        """Requests that neither got an answer nor an error."""
        return self.vanished + self.silent


class LoadPoint(StrictModel):
    """A number of clients, each of which asks again as soon as it has its answer."""

    streams: int
    seconds: float
    outcomes: Outcomes
    different: int = Field(description="answers that differ from that to the same prompt alone")
    tokens: int
    tokens_per_second: float
    first_text: Percentiles | None = Field(description="from the request to its first text")
    inter_token: Percentiles | None = Field(description="per answer: (last - first text) / (tokens - 1)")
    gap: Percentiles | None = Field(description="between two responses of a stream; a response may hold several tokens")
    memory_before: Memory
    memory_after: Memory


class Fault(StrictModel):
    """What happened when something was broken on purpose."""

    name: str
    passed: bool
    outcomes: Outcomes = Field(description="of the requests that were open")
    figures: dict[str, float] = Field(description="seconds unless the name says otherwise")
    problems: tuple[str, ...] = Field(description="what was expected and did not happen")


class Malformed(StrictModel):
    """Broken requests of one kind."""

    sent: int = 0
    refused: int = 0
    accepted: int = Field(0, description="turned out to be valid; stopped after the first response")
    closed: int = Field(0, description="the stream was closed without a word: gRPC could not read the message")
    silent: int = 0
    connection_lost: int = 0
    leaks: int = Field(0, description="error messages that hold a traceback or a path")


class Fuzzing(StrictModel):
    """Broken requests between valid ones."""

    seed: int
    seconds: float
    kinds: dict[str, Malformed]
    valid: Outcomes
    different: int = Field(description="valid requests whose answer was not the expected one")
    examples: tuple[str, ...] = Field(description="first messages of requests that did not simply get an error")
    memory_before: Memory
    memory_after: Memory


class Sample(StrictModel):
    """Memory at a moment of a soak."""

    seconds: float
    memory: Memory


class Soak(StrictModel):
    """A long run with answers, cancelled streams and broken requests."""

    streams: int
    seconds: float
    outcomes: Outcomes
    cancelled: int
    malformed: int
    different: int
    tokens: int
    incidents: tuple[str, ...] = Field(description="what the launcher said of servers that died or hung")
    samples: tuple[Sample, ...]
    slope: dict[str, float] = Field(description="MiB per hour after the first quarter, least squares")


class ServingResult(StrictModel):
    """Everything one run measured."""

    command: str
    engine: EngineInfo
    environment: Environment
    processors: int
    load_average: float = Field(description="of the machine over the minute before the run")
    niceness: int
    slots: int
    answer_tokens: int = Field(description="longest answer")
    start_seconds: float = Field(description="from the launch to the first token")
    load: tuple[LoadPoint, ...] = ()
    faults: tuple[Fault, ...] = ()
    fuzzing: Fuzzing | None = None
    soak: Soak | None = None
