"""Generation by the Triton server, for many clients at once."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
import tritonclient.grpc.aio as grpcclient
from tritonclient.utils import InferenceServerException

from prism_trt.client.generate import Chunk, Options, await_end, chunk_of, request_inputs
from prism_trt.deploy.interface import TRY_AGAIN
from prism_trt.errors import PrismError
from prism_trt.frontend.errors import ApiError

_READY_SECONDS = 2.0
_CHANNEL = [
    # A server that comes back is found within two seconds, not within gRPC's two minutes.
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Each front end process talks to one server; none of the machine's proxies lies between them.
    ("grpc.enable_http_proxy", 0),
]
_REAL_CODES = {"triton_grpc_error": "true"}
"""Header with which Triton ends a failed stream with a gRPC status instead of a message without one."""
_DRAINING = "the server is shutting down: try another"

log = logging.getLogger(__name__)


def read_authorities(path: Path) -> bytes:
    """The certificates (PEM) of a file.

    Raises:
        PrismError: it cannot be read or holds none.
    """
    try:
        ssl.create_default_context(cafile=path)
        return path.read_bytes()
    except OSError as error:
        raise PrismError(f"{path} holds no certificates ({error.strerror or error}): pass a PEM file") from None


class TritonClient:
    """One gRPC channel; made and used within an event loop.

    Args:
        url: HOST:PORT of the server's gRPC endpoint.
        model: name of the served model.
        authorities: certificates (PEM) that the server's must be signed by; None: no TLS.
    """

    def __init__(self, url: str, model: str, authorities: bytes | None) -> None:
        self._model = model
        self._calls: set[Any] = set()
        self._draining = False
        credentials = None if authorities is None else grpc.ssl_channel_credentials(authorities)
        self._client = grpcclient.InferenceServerClient(url, creds=credentials, channel_args=_CHANNEL)

    async def close(self) -> None:
        """Close the channel."""
        await self._client.close()

    def end_calls(self) -> None:
        """End what still runs with an error that says so, and everything that comes."""
        self._draining = True
        for call in list(self._calls):
            call.cancel()

    async def ready(self) -> bool:
        """Whether the server says that the model can be used."""
        try:
            return bool(await self._client.is_model_ready(self._model, client_timeout=_READY_SECONDS))
        except (InferenceServerException, grpc.RpcError):
            return False

    async def generate(
        self, prompt: str, messages: list[dict[str, str]] | None, options: Options, request_id: str
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the answer piece by piece; closing the iterator cancels the request on the server.

        Args:
            prompt: text to continue; empty with `messages`.
            messages: a conversation to answer, in place of `prompt`.
            options: the rest of the request.
            request_id: how the server's log calls it.

        Raises:
            ApiError: the server refuses the request, fails, is silent for `options.timeout` seconds or is absent.
        """
        inputs = request_inputs(prompt, options)
        if messages is not None:
            conversation = np.array([[json.dumps(messages, ensure_ascii=False).encode()]], dtype=np.object_)
            inputs.append(grpcclient.InferInput("messages", [1, 1], "BYTES"))
            inputs[-1].set_data_from_numpy(conversation)
        request = {"model_name": self._model, "inputs": inputs, "request_id": request_id}
        if self._draining:
            raise ApiError(503, _DRAINING)
        call = self._client.stream_infer(_single(request), headers=_REAL_CODES)
        self._calls.add(call)
        try:
            while True:
                chunk = await self._next(call, options.timeout)
                if chunk.statistics is not None:
                    self._calls.discard(call)
                    await await_end(call)
                    yield chunk
                    return
                yield chunk
        finally:
            self._calls.discard(call)
            call.cancel()

    async def _next(self, call: Any, timeout: float) -> Chunk:
        try:
            result, error = await asyncio.wait_for(anext(call), timeout)
        except asyncio.TimeoutError:
            log.error("the server sent nothing for %g s", timeout)
            raise ApiError(504, "the model server sends nothing: try again later") from None
        except StopAsyncIteration:
            raise _failure(grpc.StatusCode.UNAVAILABLE, "the stream ended early") from None
        except grpc.RpcError as refusal:
            raise _failure(refusal.code(), refusal.details() or "") from None
        except asyncio.CancelledError:
            if self._draining:
                raise ApiError(503, _DRAINING) from None
            raise
        if error is not None:
            raise _failure(grpc.StatusCode.UNKNOWN, error.message() or "")
        return chunk_of(result)


def _failure(code: grpc.StatusCode, details: str) -> ApiError:
    """What a client is told about a gRPC status.

    Only refusals of the request itself are passed on: what else Triton says is for the log, as it may hold paths.
    """
    sentence = details.strip().splitlines()[0] if details.strip() else ""
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return ApiError(400, sentence)
    log.warning("the model server answered %s: %s", code.name, details)
    if code is grpc.StatusCode.UNAVAILABLE and sentence.endswith(TRY_AGAIN):
        return ApiError(429, sentence, code="rate_limit_exceeded")
    # While it starts or stops, Triton does not know its own model.
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.CANCELLED):
        return ApiError(503, "the model server cannot be reached or is restarting: try again later")
    return ApiError(500, "the model server failed: see its log")


async def _single(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield request
