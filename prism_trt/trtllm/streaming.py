"""Write safetensors files tensor by tensor; the library's own writer wants all of them in memory.

Format: https://github.com/huggingface/safetensors#format: the header's size (8 bytes, little-endian), a JSON header
with dtype, shape and place of every tensor, and their bytes in the same order without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from prism_trt.trtllm.layout import FP8, StoredTensor

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", FP8: "F8_E4M3"}
_ALIGNMENT = 8


def write_safetensors(path: Path, tensors: Sequence[StoredTensor]) -> int:
    """Write `tensors` to `path`, computing one at a time; returns the file's size in bytes."""
    # Wider types first, as the library does, so that every tensor is aligned.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in ordered:
            _write(file, tensor)
        return file.tell()


def _write(file: BinaryIO, tensor: StoredTensor) -> None:
    """Compute and write one tensor, and forget it."""
    value = tensor.compute().detach().contiguous()
    if value.shape != tensor.shape or value.dtype != tensor.dtype:
        raise ValueError(f"{tensor.name} is {value.dtype} {list(value.shape)}, not as announced")
    file.write(value.view(torch.uint8).numpy().data)
