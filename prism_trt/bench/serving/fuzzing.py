"""Broken requests between valid ones, which must not notice."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2

from prism_trt.bench.serving.deployment import Deployment
from prism_trt.bench.serving.malformed import BrokenRequest, broken_requests
from prism_trt.bench.serving.results import Fuzzing, Malformed
from prism_trt.bench.serving.streams import CHANNEL, Attempt, ask, connect, count
from prism_trt.client.generate import Options

_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
_LEAK = re.compile(r"Traceback|\.py\b|(?<![\w./])/(?:tmp|usr|opt|home|dev|root|proc)/")
_EXAMPLES = 20
_PATIENCE = 30.0


@dataclass
class _Tally:
    kinds: dict[str, dict[str, int]] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, kind: str, outcome: str, message: str) -> None:
        counts = self.kinds.setdefault(kind, dict.fromkeys(Malformed.model_fields, 0))
        leak = bool(_LEAK.search(message))
        for name in ("sent", outcome, *(["leaks"] if leak else [])):
            counts[name] += 1
        if (leak or outcome in ("silent", "connection_lost")) and len(self.examples) < _EXAMPLES:
            self.examples.append(f"{kind}: {outcome}: {message[:300]}")


async def run_fuzzing(
    deployment: Deployment,
    requests: int,
    seed: int,
    options: Options,
    expected: Mapping[str, str],
    advance: Callable[[], None],
    senders: int = 4,
    clients: int = 2,
) -> Fuzzing:
    """Send broken requests from `senders` while `clients` keep asking properly.

    Args:
        expected: the prompts of the valid requests and their answers.
        advance: called after each broken request.
    """
    before = deployment.memory()
    began = time.perf_counter()
    tally = _Tally()
    broken = itertools.islice(broken_requests(options.model, seed), requests)
    attempts: list[tuple[str, Attempt]] = []
    prompts = itertools.cycle(expected)
    client = connect(deployment.grpc_url)

    async def send() -> None:
        async with grpc.aio.insecure_channel(deployment.grpc_url, options=CHANNEL) as channel:
            for request in broken:
                tally.add(request.kind, *await send_broken(channel, request))
                advance()

    async def keep_asking() -> None:
        while True:
            prompt = next(prompts)
            attempts.append((prompt, await ask(client, prompt, options)))

    asking = [asyncio.create_task(keep_asking()) for _ in range(clients)]
    try:
        await asyncio.gather(*(send() for _ in range(senders)))
        # The server has met all of it and must still be the same.
        attempts += [(prompt, await ask(client, prompt, options)) for prompt in expected]
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await client.close()
    return Fuzzing(
        seed=seed,
        seconds=time.perf_counter() - began,
        kinds={kind: Malformed(**counts) for kind, counts in sorted(tally.kinds.items())},
        valid=count(attempt for _, attempt in attempts),
        different=sum(attempt.text != expected[prompt] for prompt, attempt in attempts),
        examples=tuple(tally.examples),
        memory_before=before,
        memory_after=deployment.memory(),
    )


async def send_broken(channel: Any, request: BrokenRequest) -> tuple[str, str]:
    """How the server took it (a count of `Malformed`), and what it said."""
    stream = channel.stream_stream(
        _METHOD, request_serializer=None, response_deserializer=service_pb2.ModelStreamInferResponse.FromString
    )

    async def skip_to_the_end(call: Any) -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    call = stream([request.message])
    try:
        response = await asyncio.wait_for(call.read(), _PATIENCE)
        if response is not grpc.aio.EOF:
            # Read to its end, not cancelled: see `prism_trt.client.streams`.
            ends = [skip_to_the_end(call)]
            if not response.error_message:
                ends.append(skip_to_the_end(stream([request.stop])))
            await asyncio.wait_for(asyncio.gather(*ends), _PATIENCE)
    except asyncio.TimeoutError:
        return "silent", ""
    except grpc.RpcError as refusal:
        lost = refusal.code() is grpc.StatusCode.UNAVAILABLE
        return "connection_lost" if lost else "refused", f"{refusal.code().name}: {refusal.details()}"
    finally:
        call.cancel()
    if response is grpc.aio.EOF:
        return "closed", ""
    return ("refused" if response.error_message else "accepted"), response.error_message
