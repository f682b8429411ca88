"""Generation by the Triton server, for many clients at once."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import numpy as np
import tritonclient.grpc.aio as grpcclient
from tritonclient.utils import InferenceServerException

from prism_trt.client.generate import Chunk, Options, request_inputs
from prism_trt.client.streams import ResponseStream
from prism_trt.deploy.interface import TRY_AGAIN, Fault, parse_error
from prism_trt.errors import PrismError
from prism_trt.frontend.errors import ApiError

_READY_SECONDS = 2.0
_CHANNEL = [
    # A server that comes back is found within two seconds, not within gRPC's two minutes.
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Each front end process talks to one server; none of the machine's proxies lies between them.
    ("grpc.enable_http_proxy", 0),
]
_UNKNOWN_MODEL = "Request for unknown model"
"""How Triton answers while it starts or stops: it does not know its own model then."""
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
        self._streams: set[ResponseStream] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._draining = False
        credentials = None if authorities is None else grpc.ssl_channel_credentials(authorities)
        self._client = grpcclient.InferenceServerClient(url, creds=credentials, channel_args=_CHANNEL)

    async def close(self) -> None:
        """Close the channel when all streams have ended."""
        await asyncio.gather(*self._closing)
        await self._client.close()

    def end_calls(self) -> None:
        """End what still runs with an error that says so, and everything that comes."""
        self._draining = True
        for stream in self._streams:
            stream.stop()

    async def ready(self) -> bool:
        """Whether the server says that the model can be used."""
        try:
            return bool(await self._client.is_model_ready(self._model, client_timeout=_READY_SECONDS))
        except (InferenceServerException, grpc.RpcError):
            return False

    async def generate(
        self, prompt: str, messages: list[dict[str, str]] | None, options: Options, name: str
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the answer piece by piece; closing the iterator stops the request on the server.

        Args:
            prompt: text to continue; empty with `messages`.
            messages: a conversation to answer, in place of `prompt`.
            options: the rest of the request.
            name: how the server calls it, with a random part after it.

        Raises:
            ApiError: the server refuses the request, fails, is silent for `options.timeout` seconds or is absent.
        """
        inputs = request_inputs(prompt, options)
        if messages is not None:
            conversation = np.array([[json.dumps(messages, ensure_ascii=False).encode()]], dtype=np.object_)
            inputs.append(grpcclient.InferInput("messages", [1, 1], "BYTES"))
            inputs[-1].set_data_from_numpy(conversation)
        if self._draining:
            raise ApiError(503, _DRAINING)
        stream = ResponseStream(self._client, self._model, inputs, name)
        self._streams.add(stream)
        try:
            while True:
                chunk = await self._next(stream, options.timeout)
                if chunk.statistics is not None and chunk.statistics.finish_reason == "cancelled":
                    raise ApiError(503, _DRAINING)
                yield chunk
                if chunk.statistics is not None:
                    return
        finally:
            self._streams.discard(stream)
            # The client has its answer, or has gone: nobody waits for this.
            closing = asyncio.create_task(stream.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _next(self, stream: ResponseStream, timeout: float) -> Chunk:
        try:
            return await stream.next(timeout)
        except asyncio.TimeoutError:
            log.error("the server sent nothing for %g s", timeout)
            raise ApiError(504, "the model server sends nothing: try again later") from None
        except StopAsyncIteration:
            raise _failure("unavailable", "the stream ended early") from None
        except InferenceServerException as refusal:
            raise _failure(*parse_error(refusal.message() or "")) from None
        except grpc.RpcError as failure:
            lost = failure.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            raise _failure("unavailable" if lost else None, failure.details() or "") from None


def _failure(fault: Fault | None, sentence: str) -> ApiError:
    """What a client is told about an error of the model server.

    Only refusals of the request itself are passed on: what else Triton says is for the log, as it may hold paths.
    """
    if fault == "invalid":
        return ApiError(400, sentence)
    log.warning("the model server failed a request (%s): %s", fault or "unknown", sentence)
    if fault == "unavailable" and sentence.endswith(TRY_AGAIN):
        return ApiError(429, sentence, code="rate_limit_exceeded")
    if fault == "unavailable" or sentence.startswith(_UNKNOWN_MODEL):
        return ApiError(503, "the model server cannot be reached or is restarting: try again later")
    return ApiError(500, "the model server failed: see its log")
