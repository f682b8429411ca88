"""The endpoints."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from prism_trt.client.generate import Chunk, Statistics
from prism_trt.config import StrictModel
from prism_trt.frontend.errors import ApiError, invalid_request
from prism_trt.frontend.formats import DONE, Answer, Entry, event
from prism_trt.frontend.guard import ApiKeys, Guard, client_of
from prism_trt.frontend.schemas import ChatRequest, CompletionRequest, GenerationRequest
from prism_trt.frontend.triton import TritonClient, read_authorities

_CLIENT_GONE = 499

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Settings(StrictModel):
    """What the front end serves, and how much of it."""

    model: str = "prism"
    grpc_url: str = "127.0.0.1:8001"
    grpc_tls_ca: Path | None = None
    max_tokens: int = Field(4096, ge=1, description="longest answer that may be asked for")
    max_body_bytes: int = Field(1 << 20, ge=1, description="largest request")
    max_requests: int = Field(256, ge=1, description="requests that may run or wait at once")
    timeout: float = Field(120.0, gt=0, description="longest silence of the server, in seconds")


def create_app(settings: Settings, keys: ApiKeys | None) -> FastAPI:
    """The application; its `state.triton` is a `TritonClient` while it runs.

    Args:
        settings: what it serves.
        keys: who may call it; None: everybody.

    Raises:
        PrismError: `settings.grpc_tls_ca` holds no certificates.
    """
    authorities = None if settings.grpc_tls_ca is None else read_authorities(settings.grpc_tls_ca)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.triton = TritonClient(settings.grpc_url, settings.model, authorities)
        yield
        await app.state.triton.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_middleware(Guard, keys=keys, requests=settings.max_requests, body=settings.max_body_bytes)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_body)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _fail)
    started = int(time.time())

    def card(name: str) -> dict[str, Any]:
        if name != settings.model:
            raise ApiError(
                404, f"the model {name!r} does not exist: use {settings.model!r}", "model", "model_not_found"
            )
        return {"id": settings.model, "object": "model", "created": started, "owned_by": "prism-trt"}

    async def generate(
        request: Request, body: GenerationRequest, answer: Answer, prompt: str, messages: list[dict[str, str]] | None
    ) -> Response:
        card(body.model)
        options = body.options(settings.model, settings.max_tokens, settings.timeout, client_of(request.scope))
        triton: TritonClient = request.app.state.triton
        chunks = triton.generate(prompt, messages, options, answer.id)
        if body.stream:
            # Failures before the first token still get a status of their own.
            first = await _while_connected(request, anext(chunks))
            return _EventStream(_events(answer, first, chunks), media_type="text/event-stream")
        return JSONResponse(await _while_connected(request, _collect(answer, chunks)))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(settings.model)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return card(name)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await generate(request, body, Answer("chat", settings.model, body.include_usage), "", body.conversation)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        answer = Answer("completion", settings.model, body.include_usage)
        return await generate(request, body, answer, body.prompt, None)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready(request: Request) -> JSONResponse:
        if await request.app.state.triton.ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "the model server is not ready"}, 503)

    return app


class _EventStream(StreamingResponse):
    """A stream whose source is closed, and its request cancelled, at once when the client goes."""

    def __init__(self, events: AsyncGenerator[str, None], media_type: str) -> None:
        super().__init__(
            events, media_type=media_type, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _events(answer: Answer, first: Chunk, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[str, None]:
    """A stream: pieces as they come, then a failure or the usual end."""
    async with aclosing(chunks):
        for value in answer.start():
            yield event(value)
        chunk, offset = first, 0
        try:
            while True:
                if chunk.text or chunk.log_probs:
                    yield event(answer.piece(chunk.text, chunk.log_probs, offset))
                    offset += sum(len(entry["token"]) for entry in chunk.log_probs)
                if chunk.statistics is not None:
                    break
                chunk = await anext(chunks)
        except ApiError as error:
            yield event(error.body)
            return
        _log(answer, chunk.statistics)
        for value in answer.end(chunk.statistics):
            yield event(value)
        yield DONE


async def _collect(answer: Answer, chunks: AsyncGenerator[Chunk, None]) -> dict[str, Any]:
    """The whole answer."""
    text, log_probs = "", list[Entry]()
    async with aclosing(chunks):
        async for chunk in chunks:
            text += chunk.text
            log_probs += chunk.log_probs
            if chunk.statistics is not None:
                _log(answer, chunk.statistics)
                return answer.whole(text, log_probs, chunk.statistics)
    raise ApiError(500, "the model server failed: see its log")


def _log(answer: Answer, end: Statistics) -> None:
    """Neither prompts nor answers go into the log."""
    log.info("%s: %d tokens in, %d out, %s", answer.id, end.num_input_tokens, end.num_output_tokens, end.finish_reason)


async def _while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Wait for `work`, and cancel it when the client goes.

    Raises:
        ClientDisconnect: the client has gone.
    """
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        error = ApiError(error.status_code, str(error.detail))
    return error.response()


async def _refuse_body(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return invalid_request(error.errors()).response()


async def _gone(_: Request, __: Exception) -> Response:
    # Nobody reads it; the status is that of nginx's log.
    return Response(status_code=_CLIENT_GONE)


async def _fail(_: Request, __: Exception) -> Response:
    return ApiError(500, "the front end failed: see its log").response()
