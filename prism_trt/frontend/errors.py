"""Failures as OpenAI's error objects: https://platform.openai.com/docs/guides/error-codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

_RETRY_SECONDS = {429: 1, 503: 5}
"""When a client may try again: a slot becomes free soon, a server takes seconds to start."""
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}}


class ApiError(HTTPException):
    """What the client gets instead of an answer.

    Args:
        status: HTTP status; 429 and 503 carry a Retry-After header.
        message: one sentence for the client; holds nothing that the client did not send or need not know.
        param: the request's parameter that is at fault.
        code: OpenAI's name for the failure.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        headers = dict(_HEADERS.get(status, {}))
        if status in _RETRY_SECONDS:
            headers["Retry-After"] = str(_RETRY_SECONDS[status])
        super().__init__(status, message, headers)
        self.message, self.param, self.code = message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object, also sent as an event of a stream that fails."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole HTTP response."""
        return JSONResponse(self.body, self.status_code, self.headers)


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors about a request's body."""
    error = errors[0]
    place = [str(part) for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON: send a JSON object")
    if not place:
        return ApiError(400, "the body is not a JSON object: send one, with the header Content-Type: application/json")
    name = ".".join(place)
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"{name} is not a parameter of this server: remove it", place[0], "unknown_parameter")
    return ApiError(400, f"{name}: {error['msg']}", place[0], error["type"])
