"""A long run: does memory grow, do answers change, is anything lost?"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping, Sequence

import grpc  # type: ignore[import-untyped]
import numpy as np

from prism_trt.bench.serving.deployment import Deployment
from prism_trt.bench.serving.fuzzing import send_broken
from prism_trt.bench.serving.malformed import broken_requests
from prism_trt.bench.serving.results import Sample, Soak
from prism_trt.bench.serving.streams import CHANNEL, Attempt, ask, connect, count
from prism_trt.client.generate import Options

_CANCEL_EVERY = 10
_CANCEL_AFTER = 3
"""Responses."""
_PAUSE = 1.0
"""Seconds that a client waits after a refusal."""
_SAMPLES = 120
_MIB = 2**20


async def run_soak(
    deployment: Deployment,
    streams: int,
    seconds: float,
    broken_seconds: float,
    seed: int,
    options: Options,
    expected: Mapping[str, str],
    advance: Callable[[float], None],
) -> Soak:
    """Keep `streams` clients busy; every tenth request is cancelled, and broken ones are sent between them.

    Args:
        broken_seconds: from one broken request to the next; 0 sends none.
        expected: the prompts of the valid requests and their answers.
        advance: told the seconds that have passed since it was told last.
    """
    client = connect(deployment.grpc_url)
    prompts = itertools.cycle(expected)
    numbers = itertools.count(1)
    attempts: list[tuple[str, Attempt]] = []
    samples: list[Sample] = []
    cancelled = malformed = 0
    began = time.perf_counter()

    def running() -> bool:
        return time.perf_counter() - began < seconds

    async def keep_asking() -> None:
        nonlocal cancelled
        while running():
            prompt = next(prompts)
            if next(numbers) % _CANCEL_EVERY == 0:
                await ask(client, prompt, options, cancel_after=_CANCEL_AFTER)
                cancelled += 1
            else:
                attempt = await ask(client, prompt, options)
                attempts.append((prompt, attempt))
                if attempt.outcome != "answers":
                    await asyncio.sleep(_PAUSE)

    async def keep_breaking() -> None:
        nonlocal malformed
        if not broken_seconds:
            return
        async with grpc.aio.insecure_channel(deployment.grpc_url, options=CHANNEL) as channel:
            for request in broken_requests(options.model, seed):
                if not running():
                    return
                await send_broken(channel, request)
                malformed += 1
                await asyncio.sleep(broken_seconds)

    async def keep_sampling() -> None:
        while running():
            samples.append(Sample(seconds=time.perf_counter() - began, memory=deployment.memory()))
            await asyncio.sleep(seconds / _SAMPLES)
            advance(seconds / _SAMPLES)

    try:
        await asyncio.gather(keep_breaking(), keep_sampling(), *(keep_asking() for _ in range(streams)))
    finally:
        await client.close()
    answers = [(prompt, attempt) for prompt, attempt in attempts if attempt.outcome == "answers"]
    return Soak(
        streams=streams,
        seconds=time.perf_counter() - began,
        outcomes=count(attempt for _, attempt in attempts),
        cancelled=cancelled,
        malformed=malformed,
        different=sum(attempt.text != expected[prompt] for prompt, attempt in answers),
        tokens=sum(attempt.tokens for _, attempt in answers),
        incidents=deployment.incidents(),
        samples=tuple(samples),
        slope=slopes(samples),
    )


def slopes(samples: Sequence[Sample]) -> dict[str, float]:
    """MiB per hour of each kind of memory, by least squares after the first quarter of the time."""
    later = [sample for sample in samples if sample.seconds >= samples[-1].seconds / 4]
    if len(later) < 2:
        return {}
    hours = np.array([sample.seconds for sample in later]) / 3600
    columns = [list(sample.memory.model_dump().values()) for sample in later]
    slope, _ = np.polyfit(hours, np.array(columns) / _MIB, 1)
    return dict(zip(later[0].memory.model_dump(), map(float, slope), strict=True))
