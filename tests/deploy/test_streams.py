"""Streams of asyncio clients end without being cancelled, whatever their requests come to."""

from __future__ import annotations

import asyncio

import pytest
import tritonclient.grpc.aio as grpcclient
from tritonclient.utils import InferenceServerException

from prism_trt.client.generate import Options, request_inputs
from prism_trt.client.streams import ResponseStream
from prism_trt.deploy.server import TritonServer
from tests.deploy.load import LONG

OK = 0
"""Code of a gRPC status."""


def read_and_close(url: str, max_tokens: int, pieces: int) -> tuple[list[str | None], int]:
    """Finish reasons of the first `pieces` pieces of an answer, and the code that its stream ends with."""

    async def run() -> tuple[list[str | None], int]:
        async with grpcclient.InferenceServerClient(url) as client:
            stream = ResponseStream(client, "prism", request_inputs("fox", Options(max_tokens=max_tokens)))
            reasons: list[str | None] = []
            try:
                for _ in range(pieces):
                    statistics = (await stream.next(60)).statistics
                    reasons.append(statistics.finish_reason if statistics else None)
            finally:
                await stream.close()
                await stream.close()
                code = (await stream._call._grpc_call.code()).value[0]
            return reasons, code

    return asyncio.run(run())


def test_answers_read_to_their_end(server: TritonServer) -> None:
    assert read_and_close(server.grpc_url, 1, 1) == (["length"], OK)


def test_answers_that_are_not_wanted_any_more(server: TritonServer) -> None:
    assert read_and_close(server.grpc_url, LONG, 2) == ([None, None], OK)
    assert read_and_close(server.grpc_url, LONG, 0) == ([], OK)


def test_stopped_answers_say_so(server: TritonServer) -> None:
    async def run() -> str:
        async with grpcclient.InferenceServerClient(server.grpc_url) as client:
            stream = ResponseStream(client, "prism", request_inputs("fox", Options(max_tokens=LONG)))
            await stream.next(60)
            stream.stop()
            while (statistics := (await stream.next(60)).statistics) is None:
                pass
            await stream.close()
            return statistics.finish_reason

    assert asyncio.run(run()) == "cancelled"


def test_refused_requests(server: TritonServer) -> None:
    with pytest.raises(InferenceServerException, match=r"\[INVALID_ARG\] max_tokens is 0"):
        read_and_close(server.grpc_url, 0, 1)


def test_readers_that_are_cancelled(server: TritonServer) -> None:
    async def run() -> int:
        async with grpcclient.InferenceServerClient(server.grpc_url) as client:
            stream = ResponseStream(client, "prism", request_inputs("fox", Options(max_tokens=LONG)))
            reader = asyncio.create_task(stream.next(60))
            await asyncio.sleep(0)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            with pytest.raises(asyncio.TimeoutError):
                await stream.next(0)
            await stream.next(60)
            await stream.close()
            return int((await stream._call._grpc_call.code()).value[0])

    assert asyncio.run(run()) == OK
