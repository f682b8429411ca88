"""Serve the model with Triton for one answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prism_trt.client.generate import Options, stream_generate
from prism_trt.deploy.server import TritonServer

MAX_TOKENS = 128


@dataclass(frozen=True)
class ServedAnswer:
    """One streamed answer and its times by the client's clock."""

    text: str
    tokens: int
    first_seconds: float
    """Until the first piece of text arrived."""
    seconds: float


def stream_answer(server: TritonServer, prompt: str, show: Callable[[str], None]) -> ServedAnswer:
    """Ask a running server, handing each piece of the answer to `show` as it arrives.

    Raises:
        PrismError: as `stream_generate`.
    """
    pieces: list[str] = []
    tokens, first = 0, 0.0
    start = time.perf_counter()
    for chunk in stream_generate(server.grpc_url, prompt, Options(model=server.model_name, max_tokens=MAX_TOKENS)):
        first = first or time.perf_counter() - start
        pieces.append(chunk.text)
        show(chunk.text)
        if chunk.statistics is not None:
            tokens = chunk.statistics.num_output_tokens
    return ServedAnswer("".join(pieces), tokens, first, time.perf_counter() - start)


def server_for(repository: Path, port: int | None) -> TritonServer:
    """A server that is not started yet; HTTP and metrics, and gRPC without `port`, get free ports."""
    return TritonServer(repository, grpc_port=port, grace=2.0)
