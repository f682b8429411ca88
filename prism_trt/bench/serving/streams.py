"""Requests as a client sees them: when each piece came, and how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import grpc  # type: ignore[import-untyped]
import numpy as np
import tritonclient.grpc.aio as grpcclient
from tritonclient.utils import InferenceServerException

from prism_trt.bench.serving.results import Outcomes
from prism_trt.client.generate import Options, request_inputs
from prism_trt.client.streams import ResponseStream

Outcome = Literal["answers", "refused", "failed", "vanished", "silent"]
CHANNEL = [("grpc.max_reconnect_backoff_ms", 500), ("grpc.enable_http_proxy", 0)]


@dataclass(frozen=True)
class Attempt:
    """One request; times are those of `time.perf_counter`."""

    outcome: Outcome
    started: float
    arrivals: tuple[float, ...]
    """One per response."""
    ended: float
    text: str = ""
    tokens: int = 0
    error: str = ""


def endless() -> Any:
    """An input that keeps the answer from ending before its `max_tokens`."""
    tensor = grpcclient.InferInput("end_id", [1, 1], "INT32")
    tensor.set_data_from_numpy(np.array([[-1]], dtype=np.int32))
    return tensor


def connect(url: str) -> grpcclient.InferenceServerClient:
    """A channel to ``host:port`` that finds a server that comes back at once; to be made within an event loop."""
    return grpcclient.InferenceServerClient(url, channel_args=CHANNEL)


async def ask(
    client: grpcclient.InferenceServerClient,
    prompt: str,
    options: Options,
    *,
    to_the_limit: bool = False,
    cancel_after: int | None = None,
    first: asyncio.Event | None = None,
) -> Attempt:
    """Send a request and read its answer.

    Args:
        to_the_limit: generate `options.max_tokens` tokens whatever the model says.
        cancel_after: responses after which the request is stopped; such an attempt counts as an answer.
        first: set when the first response has come.
    """
    inputs = request_inputs(prompt, options)
    if to_the_limit:
        inputs.append(endless())
    started = time.perf_counter()
    arrivals: list[float] = []
    text, tokens = "", 0

    def end(outcome: Outcome, error: str = "") -> Attempt:
        return Attempt(outcome, started, tuple(arrivals), time.perf_counter(), text, tokens, error)

    stream = ResponseStream(client, options.model, inputs)
    try:
        while True:
            chunk = await stream.next(options.timeout)
            arrivals.append(time.perf_counter())
            if first is not None:
                first.set()
            text += chunk.text
            if chunk.statistics is not None:
                tokens = chunk.statistics.num_output_tokens
                return end("answers")
            if cancel_after is not None and len(arrivals) >= cancel_after:
                return end("answers")
    except asyncio.TimeoutError:
        return end("silent")
    except StopAsyncIteration:
        return end("vanished")
    except grpc.RpcError as refusal:
        return end("failed" if arrivals else "refused", f"{refusal.code().name}: {refusal.details()}")
    except InferenceServerException as refusal:
        return end("failed" if arrivals else "refused", str(refusal.message()))
    finally:
        await stream.close()


def count(attempts: Iterable[Attempt]) -> Outcomes:
    """How many attempts ended how."""
    counts: dict[str, int] = {}
    for attempt in attempts:
        counts[attempt.outcome] = counts.get(attempt.outcome, 0) + 1
    return Outcomes(**counts)


async def expected_answers(url: str, prompts: Iterable[str], options: Options) -> dict[str, str]:
    """The answer to each prompt when it is the only one."""
    client = connect(url)
    try:
        attempts = {prompt: await ask(client, prompt, options) for prompt in prompts}
    finally:
        await client.close()
    for attempt in attempts.values():
        if attempt.outcome != "answers":
            raise RuntimeError(f"a request on an idle server ended as {attempt.outcome}: {attempt.error}")
    return {prompt: attempt.text for prompt, attempt in attempts.items()}
