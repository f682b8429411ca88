"""Streaming generation over gRPC."""

from __future__ import annotations

import json
import math
import queue
import time
import uuid
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from prism_trt.client.limits import INT32, UINT64, check_integer, check_seconds, check_text
from prism_trt.deploy.interface import parse_error
from prism_trt.errors import PrismError

_CONNECT_SECONDS = 10.0
END_SECONDS = 10.0
"""Longest wait for the end of a request that is stopped, which should take no more than a round."""
_FLOAT32 = np.finfo(np.float32)


@dataclass(frozen=True)
class Options:
    """One request's settings; None leaves the choice to the server."""

    model: str = "prism"
    max_tokens: int = 256
    stream: bool = True
    """Yield the answer piece by piece as it is made, rather than in one piece."""
    chat: bool = True
    """Wrap the prompt in the model's chat template."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    log_probs: int | None = None
    """Also get the tokens' log-probabilities, and those of so many alternatives."""
    user: str = ""
    """Users share the server fairly."""
    timeout: float = 120.0
    """Longest silence of the server, in seconds; an answer may take longer, in one piece as well."""


@dataclass(frozen=True)
class Statistics:
    """What the server reports at the end of a request."""

    finish_reason: str
    num_input_tokens: int
    num_reused_tokens: int
    """Input tokens that the server had computed for an earlier request."""
    num_output_tokens: int
    target_passes: int
    drafted: int
    accepted: int

    @property
    def acceptance_length(self) -> float:
        """Output tokens per target pass; the prefill and the token that it gives count in neither."""
        return (self.num_output_tokens - 1) / self.target_passes if self.target_passes else float("nan")


@dataclass(frozen=True)
class Chunk:
    """A piece of the answer; the last one carries the statistics."""

    text: str
    statistics: Statistics | None = None
    log_probs: tuple[dict[str, Any], ...] = ()
    """If asked for, the tokens since the last piece, as in `logprobs.content` of OpenAI's chat API."""


def stream_generate(url: str, prompt: str, options: Options | None = None) -> Generator[Chunk, None, None]:
    """Yield the answer to `prompt` piece by piece from the server at `url` (``host:port`` of its gRPC endpoint).

    Closing the iterator early, as any exception does, stops the request on the server.

    Raises:
        PrismError: the request cannot be sent; the server cannot be reached, refuses the request, or is silent for
            `options.timeout` seconds.
    """
    options = options or Options()
    with closing(_pieces(url, prompt, options)) as pieces:
        if options.stream:
            yield from pieces
        else:
            yield _whole(pieces)


def _whole(pieces: Iterable[Chunk]) -> Chunk:
    """All pieces of an answer as one."""
    chunks = list(pieces)
    log_probs = tuple(entry for chunk in chunks for entry in chunk.log_probs)
    return Chunk("".join(chunk.text for chunk in chunks), chunks[-1].statistics, log_probs)


def _pieces(url: str, prompt: str, options: Options) -> Generator[Chunk, None, None]:
    inputs = request_inputs(prompt, options)
    check_seconds("timeout", options.timeout)
    check_text("the model's name", options.model)
    check_text("the server's address", url)
    request_id = new_request_id()
    responses: queue.Queue[tuple[grpcclient.InferResult | None, InferenceServerException | None]] = queue.Queue()
    try:
        client = grpcclient.InferenceServerClient(url)
    except InferenceServerException as refusal:
        raise PrismError(f"{url} is not a server address ({refusal.message()}): pass --url HOST:PORT") from None
    running = False
    try:
        _check_server(client, url)
        client.start_stream(lambda result, error: responses.put((result, error)))
        client.async_stream_infer(options.model, inputs, request_id=request_id)
        running = True
        while True:
            try:
                result, error = responses.get(timeout=options.timeout)
            except queue.Empty:
                raise PrismError(
                    f"the server sent nothing for {options.timeout:g} s: check it, or allow more with --timeout"
                ) from None
            if error is not None:
                running = False
                raise PrismError(f"the server answered: {_sentence(error)}")
            chunk = chunk_of(result)
            if chunk.statistics is not None:
                running = False
                yield chunk
                return
            yield chunk
    finally:
        try:
            if running:
                client.async_stream_infer(options.model, stop_inputs(), request_id=request_id)
                _skip_to_the_end(responses)
            client.stop_stream()  # reads to the end: see `prism_trt.client.streams`
        except (queue.Empty, InferenceServerException):
            client.stop_stream(cancel_requests=True)  # the server is silent or gone
        finally:
            client.close()


def _skip_to_the_end(responses: queue.Queue[Any]) -> None:
    """Raises queue.Empty unless a request's last response or its error comes soon."""
    deadline = time.monotonic() + END_SECONDS
    while True:
        result, error = responses.get(timeout=max(0.0, deadline - time.monotonic()))
        if error is not None or chunk_of(result).statistics is not None:
            return


def _check_server(client: grpcclient.InferenceServerClient, url: str) -> None:
    try:
        alive = client.is_server_ready(client_timeout=_CONNECT_SECONDS)
    except InferenceServerException:
        raise PrismError(
            f"no server answers at {url}: start one with `python -m prism_trt.deploy --run`, or pass another address "
            "with --url"
        ) from None
    if not alive:
        raise PrismError(f"the server at {url} is still starting or is shutting down: try again in a moment")


def new_request_id(name: str = "") -> str:
    """An id that begins with `name`. A server stops requests by their id, so nobody else may have it or guess it."""
    return f"{name}-{uuid.uuid4().hex}" if name else uuid.uuid4().hex


def request_inputs(prompt: str, options: Options) -> list[grpcclient.InferInput]:
    """The server's input tensors of a request.

    It is always streamed, so that silence means that no token is made.

    Raises:
        PrismError: something cannot be sent.
    """
    for name, text in {"the prompt": prompt, "the user's name": options.user}.items():
        check_text(name, text)
    for word in options.stop:
        check_text("a stop word", word)
    values: dict[str, tuple[str, np.ndarray]] = {
        "text_input": ("BYTES", np.array([[prompt.encode()]], dtype=np.object_)),
        "max_tokens": ("INT32", _int32("max_tokens", options.max_tokens)),
        "stream": ("BOOL", np.array([[True]])),
        "chat": ("BOOL", np.array([[options.chat]])),
        "exclude_input_in_output": ("BOOL", np.array([[True]])),
    }
    if options.temperature is not None:
        values["temperature"] = ("FP32", _float32(options.temperature))
    if options.top_k is not None:
        values["top_k"] = ("INT32", _int32("top_k", options.top_k))
    if options.top_p is not None:
        values["top_p"] = ("FP32", _float32(options.top_p))
    if options.seed is not None:
        check_integer("seed", options.seed, UINT64)
        values["seed"] = ("UINT64", np.array([[options.seed]], dtype=np.uint64))
    if options.stop:
        values["stop_words"] = ("BYTES", np.array([[word.encode() for word in options.stop]], dtype=np.object_))
    if options.log_probs is not None:
        values["top_log_probs"] = ("INT32", _int32("log_probs", options.log_probs))
    if options.user:
        values["user"] = ("BYTES", np.array([[options.user.encode()]], dtype=np.object_))
    return _tensors(values)


def _int32(name: str, value: int) -> np.ndarray:
    check_integer(name, value, INT32)
    return np.array([[value]], dtype=np.int32)


def _float32(value: float) -> np.ndarray:
    """The nearest float32 that is neither 0, which can mean "not set", nor infinite, unless `value` is."""
    if value and math.isfinite(value):
        size = min(max(abs(value), float(_FLOAT32.tiny)), float(_FLOAT32.max))
        value = math.copysign(size, value)
    return np.array([[value]], dtype=np.float32)


def stop_inputs() -> list[grpcclient.InferInput]:
    """The input tensors of a request that ends the one with the same id."""
    return _tensors(
        {
            "text_input": ("BYTES", np.array([[b""]], dtype=np.object_)),
            "max_tokens": ("INT32", np.array([[1]], dtype=np.int32)),
            "stop": ("BOOL", np.array([[True]])),
        }
    )


def _tensors(values: dict[str, tuple[str, np.ndarray]]) -> list[grpcclient.InferInput]:
    inputs = []
    for name, (data_type, array) in values.items():
        tensor = grpcclient.InferInput(name, list(array.shape), data_type)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def chunk_of(result: grpcclient.InferResult) -> Chunk:
    """What one response of a stream holds."""
    text = result.as_numpy("text_output").item().decode()
    described = result.as_numpy("log_probs")
    log_probs = () if described is None else tuple(json.loads(described.item()))
    if result.as_numpy("finish_reason") is None:
        return Chunk(text, None, log_probs)
    numbers = {
        field: int(result.as_numpy(name).item())
        for field, name in (
            ("num_input_tokens", "num_input_tokens"),
            ("num_reused_tokens", "num_reused_tokens"),
            ("num_output_tokens", "num_output_tokens"),
            ("target_passes", "num_target_passes"),
            ("drafted", "total_draft_tokens"),
            ("accepted", "total_accepted_draft_tokens"),
        )
    }
    reason = result.as_numpy("finish_reason").item().decode()
    return Chunk(text, Statistics(finish_reason=reason, **numbers), log_probs)


def _sentence(error: InferenceServerException) -> str:
    _, sentence = parse_error(error.message() or str(error))
    return sentence.splitlines()[0]
