"""A gRPC server that answers as it is told, and remembers what it was asked."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

PIECES = ("The ", "Größe ", "東", "京", " fox", "", " 🦊.")
"""What is answered."""
TEXT = "".join(PIECES)
NUMBERS = {
    "num_input_tokens": 5,
    "num_reused_tokens": 2,
    "num_output_tokens": 7,
    "num_target_passes": 3,
    "total_draft_tokens": 8,
    "total_accepted_draft_tokens": 4,
}
_FORMATS = {"INT32": "<i", "FP32": "<f", "BOOL": "<?", "UINT64": "<Q"}


def entry(text: str) -> dict[str, Any]:
    """A token with its log-probability."""
    return {"token": text, "logprob": -0.5, "bytes": list(text.encode()), "top_logprobs": []}


@dataclass
class Fake(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Sends `PIECES`, one each `pause` seconds, or all at the end to who does not ask for a stream."""

    pause: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Requests: their inputs and "id"."""

    def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=True)

    def ModelStreamInfer(self, request_iterator: Iterator[Any], context: Any) -> Iterator[Any]:
        asked = _inputs(next(request_iterator))
        self.asked.append(asked)
        held: list[str] = []
        for number, piece in enumerate(PIECES, 1):
            time.sleep(self.pause)
            held.append(piece)
            if number == len(PIECES):
                yield _response(held, asked, {"finish_reason": b"stop", **NUMBERS})
            elif asked["stream"]:
                yield _response(held, asked, {})
                held = []
        self.asked += [_inputs(request) for request in request_iterator]


def _inputs(request: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"id": request.id}
    for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True):
        values[tensor.name] = (
            content[4:].decode() if tensor.datatype == "BYTES" else struct.unpack(_FORMATS[tensor.datatype], content)[0]
        )
    return values


def _response(pieces: list[str], asked: dict[str, Any], rest: dict[str, bytes | int]) -> Any:
    response = service_pb2.ModelInferResponse(model_name="prism", id=asked["id"])
    outputs: dict[str, bytes | int] = {"text_output": "".join(pieces).encode(), **rest}
    if "top_log_probs" in asked:
        outputs["log_probs"] = json.dumps([entry(piece) for piece in pieces]).encode()
    for name, value in outputs.items():
        kind = "BYTES" if isinstance(value, bytes) else "INT32"
        response.outputs.add(name=name, datatype=kind, shape=[1, 1])
        raw = struct.pack("<I", len(value)) + value if isinstance(value, bytes) else struct.pack("<i", value)
        response.raw_output_contents.append(raw)
    return service_pb2.ModelStreamInferResponse(infer_response=response)


@contextmanager
def fake_server(pause: float = 0.0) -> Iterator[tuple[str, Fake]]:
    """A running one and its address."""
    fake = Fake(pause)
    server = grpc.server(ThreadPoolExecutor(16))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", fake
    finally:
        server.stop(None).wait()
