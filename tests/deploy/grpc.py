"""Raw requests, including those that the client of the project would not send."""

from __future__ import annotations

import queue
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient

TYPES = {"O": "BYTES", "i": "INT32", "f": "FP32", "b": "BOOL", "u": "UINT64"}


def tensor(value: Any) -> np.ndarray:
    """[1, n] array of the type that the interface wants."""
    values = value if isinstance(value, list) else [value]
    first = values[0] if values else ""
    if isinstance(first, bool):
        return np.array([values])
    if isinstance(first, int):
        return np.array([values], dtype=np.int32)
    if isinstance(first, float):
        return np.array([values], dtype=np.float32)
    return np.array([[v.encode() if isinstance(v, str) else v for v in values]], dtype=np.object_)


def input_tensors(inputs: dict[str, Any]) -> list[grpcclient.InferInput]:
    """The tensors of a request."""
    tensors = []
    for name, value in inputs.items():
        array = value if isinstance(value, np.ndarray) else tensor(value)
        tensors.append(grpcclient.InferInput(name, list(array.shape), TYPES[array.dtype.kind]))
        tensors[-1].set_data_from_numpy(array)
    return tensors


def ask(
    url: str,
    inputs: dict[str, Any],
    parameters: dict[str, Any] | None = None,
    timeout_us: int | None = None,
    scalars: bool = True,
) -> list[dict[str, Any]]:
    """All responses to one request, as dictionaries of arrays, or of the scalars in those that hold but one.

    An error is ``{"error": message}`` and the last.
    """
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    responses: list[dict[str, Any]] = []
    with grpcclient.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("prism", input_tensors(inputs), parameters=parameters, timeout=timeout_us)
        while not responses or not responses[-1].keys() & {"error", "finish_reason"}:
            result, error = answers.get(timeout=60)
            if error is not None:
                responses.append({"error": error.message()})
                continue
            outputs = [output.name for output in result.get_response().outputs]
            arrays = {name: result.as_numpy(name) for name in outputs}
            responses.append(
                {name: array.item() if scalars and array.size == 1 else array for name, array in arrays.items()}
            )
        client.stop_stream()
    return responses
