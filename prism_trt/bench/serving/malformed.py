"""Requests that no client should send, as bytes on the wire; the same seed gives the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput, service_pb2

from prism_trt.client.generate import Options, request_inputs, stop_inputs
from prism_trt.deploy.interface import INPUTS

_DATA_TYPES = ("", "BOOL", "INT8", "INT32", "INT64", "UINT64", "FP16", "FP32", "FP64", "BYTES", "BF16", "NONSENSE")
_DIMENSIONS = (0, 1, 2, -1, 65, 2**31, 2**62, -(2**63))
_NUMBERS: dict[str, tuple[float, ...]] = {
    "max_tokens": (0, -1, -(2**31)),
    "temperature": (float("nan"), float("inf"), -1.0),
    "top_p": (float("nan"), 2.0, -0.5),
    "top_k": (-1, -(2**31)),
    "end_id": (-2, 2**31 - 1),
    "beam_width": (2,),
    "repetition_penalty": (1.5, float("nan")),
}
_LARGE = 1 << 20


@dataclass(frozen=True)
class BrokenRequest:
    """A serialised ``ModelInferRequest``."""

    kind: str
    message: bytes
    stop: bytes
    """A request, serialised as well, that ends this one should the server have accepted it."""


def broken_requests(model: str, seed: int) -> Iterator[BrokenRequest]:
    """Endless broken requests to `model`, the kinds in turn."""
    random = Random(seed)
    while True:
        for kind, breaking in _KINDS.items():
            request = _request(model, random)
            changed = breaking(random, request)
            message = changed if isinstance(changed, bytes) else request.SerializeToString()
            yield BrokenRequest(kind, message, _message(model, request.id, stop_inputs()).SerializeToString())


def _request(model: str, random: Random) -> Any:
    """A valid request with a random set of optional inputs."""
    options = Options(model=model, max_tokens=random.randint(1, 4), chat=random.random() < 0.5, stop=("zebra",))
    return _message(model, f"{random.getrandbits(64):016x}", request_inputs("The quick brown fox", options))


def _message(model: str, request_id: str, inputs: list[InferInput]) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for tensor in inputs:
        request.inputs.append(tensor._get_tensor())
        request.raw_input_contents.append(tensor._get_content())
    return request


def _place(random: Random, request: Any) -> int:
    return random.randrange(len(request.inputs))


def _add(request: Any, name: str, data_type: str, array: np.ndarray) -> None:
    request.inputs.add(name=name, datatype=data_type, shape=array.shape)
    request.raw_input_contents.append(array.tobytes())


def _replace(request: Any, name: str, content: bytes) -> None:
    (place,) = [index for index, tensor in enumerate(request.inputs) if tensor.name == name]
    request.raw_input_contents[place] = content


def _text(data: bytes) -> bytes:
    """One string as Triton wants it: a little-endian length before it."""
    return len(data).to_bytes(4, "little") + data


def _noise(random: Random, most: int) -> bytes:
    return random.randbytes(random.randint(0, most))


def _missing_input(random: Random, request: Any) -> None:
    place = random.randrange(2)  # the required ones come first
    del request.inputs[place], request.raw_input_contents[place]


def _data_type(random: Random, request: Any) -> None:
    tensor = request.inputs[_place(random, request)]
    tensor.datatype = random.choice([name for name in _DATA_TYPES if name != tensor.datatype])


def _shape(random: Random, request: Any) -> None:
    tensor = request.inputs[_place(random, request)]
    shape = [random.choice(_DIMENSIONS) for _ in range(random.randint(0, 5))]
    del tensor.shape[:]
    tensor.shape.extend([7, 7] if shape == [1, 1] else shape)


def _content_length(random: Random, request: Any) -> None:
    place = _place(random, request)
    content = request.raw_input_contents[place]
    longer = random.random() < 0.5
    request.raw_input_contents[place] = content + _noise(random, 64) + b"x" if longer else content[: len(content) // 2]


def _content_count(random: Random, request: Any) -> None:
    if random.random() < 0.5:
        del request.raw_input_contents[_place(random, request) :]
    else:
        request.raw_input_contents.append(_noise(random, 16))


def _string_prefix(random: Random, request: Any) -> None:
    length = random.choice((0xFFFFFFFF, 0x7FFFFFFF, 1000, 18))
    _replace(request, "text_input", length.to_bytes(4, "little") + b"The quick brown fox")


def _not_utf8(random: Random, request: Any) -> None:
    name = random.choice(("text_input", "stop_words"))
    _replace(request, name, _text(b"\xff\xfe" + _noise(random, 32)))


def _number(random: Random, request: Any) -> None:
    name = random.choice(list(_NUMBERS))
    value = random.choice(_NUMBERS[name])
    (data_type,) = [tensor.type for tensor in INPUTS if tensor.name == name]
    array = np.array([[value]], dtype=np.int32 if data_type == "INT32" else np.float32)
    if name == "max_tokens":
        _replace(request, name, array.tobytes())
    else:
        _add(request, name, data_type, array)


def _huge_max_tokens(random: Random, request: Any) -> None:
    _replace(request, "max_tokens", np.array([[random.randint(2**20, 2**31 - 1)]], dtype=np.int32).tobytes())


def _unknown_input(random: Random, request: Any) -> None:
    _add(
        request,
        random.choice(("temprature", "", "text_output", "a" * 5000, "naïve")),
        "INT32",
        np.array([[1]], np.int32),
    )


def _unknown_parameter(random: Random, request: Any) -> None:
    name = random.choice(("temprature", "", "sequence_id", "../../etc", "x" * 5000))
    kind, value = random.choice(
        (("int64_param", 7), ("string_param", "x"), ("bool_param", True), ("double_param", 0.5))
    )
    setattr(request.parameters[name], kind, value)


def _parameter_type(random: Random, request: Any) -> None:
    name = random.choice(("timeout", "priority", "sequence_start", "binary_data", "shared_memory_region"))
    kind, value = random.choice((("string_param", "yes"), ("double_param", float("nan")), ("int64_param", -(2**63))))
    setattr(request.parameters[name], kind, value)


def _unknown_model(random: Random, request: Any) -> None:
    if random.random() < 0.5:
        request.model_name = random.choice(("", "absent", "../prism", "p" * 5000))
    else:
        request.model_version = random.choice(("2", "-1", "one", "99999999999999999999"))


def _prompt_size(random: Random, request: Any) -> None:
    _replace(request, "text_input", _text(b"" if random.random() < 0.5 else b"a" * random.randint(_LARGE // 2, _LARGE)))


def _twice(random: Random, request: Any) -> None:
    place = _place(random, request)
    request.inputs.append(request.inputs[place])
    request.raw_input_contents.append(request.raw_input_contents[place])


def _inline_content(random: Random, request: Any) -> None:
    if random.random() < 0.5:
        del request.raw_input_contents[:]
    contents = request.inputs[_place(random, request)].contents
    getattr(contents, random.choice(("int_contents", "int64_contents", "fp32_contents"))).extend(
        [1] * random.randint(0, 9)
    )


def _unknown_output(random: Random, request: Any) -> None:
    request.outputs.add(name=random.choice(("absent", "", "text_input")))


def _shared_memory(random: Random, request: Any) -> None:
    tensor = request.inputs[_place(random, request)]
    tensor.parameters["shared_memory_region"].string_param = random.choice(("absent", "prism_trt_1_", ""))
    tensor.parameters["shared_memory_byte_size"].int64_param = random.choice((0, 8, -1, 2**62))


def _flipped_bytes(random: Random, request: Any) -> bytes:
    message = bytearray(request.SerializeToString())
    for _ in range(random.randint(1, 8)):
        message[random.randrange(len(message))] = random.randrange(256)
    return bytes(message)


def _nonsense(random: Random, request: Any) -> bytes:
    return _noise(random, 400)


_KINDS: dict[str, Callable[[Random, Any], bytes | None]] = {
    "missing input": _missing_input,
    "wrong data type": _data_type,
    "wrong shape": _shape,
    "content too long or short": _content_length,
    "wrong number of contents": _content_count,
    "wrong string length": _string_prefix,
    "not UTF-8": _not_utf8,
    "number out of range": _number,
    "huge max_tokens": _huge_max_tokens,
    "unknown input": _unknown_input,
    "unknown parameter": _unknown_parameter,
    "parameter of a wrong type": _parameter_type,
    "unknown model or version": _unknown_model,
    "empty or huge prompt": _prompt_size,
    "input twice": _twice,
    "inline contents": _inline_content,
    "unknown output": _unknown_output,
    "unregistered shared memory": _shared_memory,
    "flipped bytes": _flipped_bytes,
    "nonsense": _nonsense,
}
KINDS = tuple(_KINDS)
