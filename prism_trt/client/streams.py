"""A gRPC stream for each request of an asyncio client.

No stream is cancelled while there is a server that can end it: some versions of Triton crash when that comes together
with a response. A request that is not wanted any more is stopped by a second one on its stream, and the stream is read
to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from prism_trt.client.generate import END_SECONDS, Chunk, chunk_of, new_request_id, stop_inputs


class ResponseStream:
    """The responses to one request; to be used, and closed, within an event loop.

    Args:
        client: sends it.
        model: name of the served model.
        inputs: the request's tensors.
        name: what the request's id begins with.
    """

    def __init__(self, client: InferenceServerClient, model: str, inputs: list[InferInput], name: str = "") -> None:
        self._request = {"model_name": model, "inputs": inputs, "request_id": new_request_id(name)}
        self._stop: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._call: Any = client.stream_infer(self._requests())
        self._answered = False
        self._reading: asyncio.Future[Any] | None = None

    async def _requests(self) -> AsyncIterator[dict[str, Any]]:
        yield self._request
        if await self._stop:
            yield self._request | {"inputs": stop_inputs()}

    async def next(self, seconds: float) -> Chunk:
        """The next piece of the answer.

        Raises:
            asyncio.TimeoutError: there was none within `seconds`.
            StopAsyncIteration: the stream has ended.
            InferenceServerException: the server says this instead, and no more.
            grpc.RpcError: the connection or the server has failed.
        """
        if self._reading is None:
            self._reading = asyncio.ensure_future(anext(self._call))
        # Not `asyncio.wait_for`: a read that is cancelled takes its stream with it.
        await asyncio.wait({self._reading}, timeout=seconds)
        if not self._reading.done():
            raise asyncio.TimeoutError
        reading, self._reading = self._reading, None
        result, error = reading.result()
        if error is not None:
            self._answered = True
            raise error
        chunk = chunk_of(result)
        self._answered = chunk.statistics is not None
        return chunk

    def stop(self) -> None:
        """Have the server end the request; its last response comes after what was sent before."""
        if not self._stop.done():
            self._stop.set_result(True)

    async def close(self) -> None:
        """Read to the end of the stream, which comes soon: a request that still runs is stopped.

        Idempotent. What the server says at the end does not matter any more.
        """
        if not self._stop.done():
            self._stop.set_result(not self._answered)
        deadline = time.monotonic() + END_SECONDS
        try:
            with contextlib.suppress(asyncio.TimeoutError, StopAsyncIteration, grpc.RpcError):
                while True:
                    with contextlib.suppress(InferenceServerException):
                        await self.next(deadline - time.monotonic())
        finally:
            self._call.cancel()
