"""What a request must pass before its body is read: a key, a place among those that run, and a limit to its size."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prism_trt.errors import PrismError
from prism_trt.frontend.errors import ApiError

PREFIX = "/v1/"
"""Paths that are guarded; the rest is health."""
_CLIENT = "prism_client"
_NAME_LETTERS = 16
_BODY_SECONDS = 30.0
"""Longest silence of a client that is sending its request."""


class ApiKeys:
    """Keys that open the API; only their hashes are kept."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """Keys of a file, one a line; empty lines and lines that begin with # do not count.

        Raises:
            PrismError: the file cannot be read or holds no key.
        """
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise PrismError(f"cannot read the API keys {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise PrismError(f"{path} is not a text file: write one API key a line") from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise PrismError(f"{path} holds no API key: write one a line")
        return cls(keys)

    def holder(self, header: bytes) -> str | None:
        """A name for the key that an Authorization header holds; None for any other, after the same time for all."""
        scheme, _, key = header.partition(b" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex()[:_NAME_LETTERS] if scheme.lower() == b"bearer" and any(matches) else None


def client_of(scope: Scope) -> str | None:
    """The holder of the key of a request that the guard let pass; None: no key was needed."""
    name: str | None = scope["state"][_CLIENT]
    return name


class Guard:
    """ASGI middleware that refuses requests before memory is spent on them.

    Args:
        app: what is guarded.
        keys: who may call; None: everybody.
        requests: how many may run or wait at once.
        body: largest request, in bytes.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys | None, requests: int, body: int) -> None:
        self._app = app
        self._keys = keys
        self._most = requests
        self._body = body
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request, or refuse it."""
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})[_CLIENT] = self._check(dict(scope["headers"]))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        self._open += 1
        try:
            await self._app(scope, self._limited(receive), send)
        finally:
            self._open -= 1

    def _check(self, headers: dict[bytes, bytes]) -> str | None:
        client = None if self._keys is None else self._keys.holder(headers.get(b"authorization", b""))
        if self._keys is not None and client is None:
            raise ApiError(
                401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key"
            )
        if self._open >= self._most:
            raise ApiError(429, f"{self._open} requests are open already: try again later", code="rate_limit_exceeded")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._body:
            raise self._too_large()
        return client

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self._body} bytes: shorten it", code="request_too_large")

    def _limited(self, receive: Receive) -> Receive:
        """`receive`, for bodies that say nothing, or something wrong, about their size."""
        size, complete = 0, False

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), _BODY_SECONDS)
            except asyncio.TimeoutError:
                raise ApiError(408, "the request was not sent to its end: send it again") from None
            size += len(message.get("body", b""))
            if size > self._body:
                raise self._too_large()
            complete = not message.get("more_body", False)
            return message

        return limited


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
