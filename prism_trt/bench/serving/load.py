"""Many clients at once: latency, throughput, and whether every request got its answer."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence

import numpy as np

from prism_trt.bench.serving.deployment import Deployment
from prism_trt.bench.serving.results import LoadPoint, Percentiles
from prism_trt.bench.serving.streams import Attempt, ask, connect, count
from prism_trt.client.generate import Options


async def run_load(
    deployment: Deployment, streams: int, seconds: float, options: Options, expected: Mapping[str, str]
) -> LoadPoint:
    """Keep `streams` clients asking for `seconds`, then let the open requests finish.

    Args:
        expected: the prompts, which the clients take in turn, and their answers.
    """
    before = deployment.memory()
    client = connect(deployment.grpc_url)
    prompts = itertools.cycle(expected)
    attempts: list[tuple[str, Attempt]] = []
    began = time.perf_counter()

    async def keep_asking() -> None:
        while time.perf_counter() - began < seconds:
            prompt = next(prompts)
            attempt = await ask(client, prompt, options)
            attempts.append((prompt, attempt))
            if attempt.outcome == "refused":
                await asyncio.sleep(0.1)  # as a client that was told to try again later

    try:
        await asyncio.gather(*(keep_asking() for _ in range(streams)))
    finally:
        await client.close()
    elapsed = time.perf_counter() - began
    answers = [(prompt, attempt) for prompt, attempt in attempts if attempt.outcome == "answers"]
    tokens = sum(attempt.tokens for _, attempt in answers)
    return LoadPoint(
        streams=streams,
        seconds=elapsed,
        outcomes=count(attempt for _, attempt in attempts),
        different=sum(attempt.text != expected[prompt] for prompt, attempt in answers),
        tokens=tokens,
        tokens_per_second=tokens / elapsed,
        first_text=percentiles([attempt.arrivals[0] - attempt.started for _, attempt in answers]),
        inter_token=percentiles(
            [
                (attempt.arrivals[-1] - attempt.arrivals[0]) / (attempt.tokens - 1)
                for _, attempt in answers
                if attempt.tokens > 1
            ]
        ),
        gap=percentiles(
            [later - earlier for _, attempt in answers for earlier, later in itertools.pairwise(attempt.arrivals)]
        ),
        memory_before=before,
        memory_after=deployment.memory(),
    )


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """p50 and p99; None without values."""
    if not values:
        return None
    p50, p99 = np.percentile(values, (50, 99))
    return Percentiles(p50=float(p50), p99=float(p99), count=len(values))
