"""Files of a foreign drafter, memory-mapped; nothing in them is executed."""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prism_trt.errors import PrismError
from prism_trt.manifest import sha256_file

CONFIG_FILE, SAFETENSORS_FILE, TORCH_FILE = "config.json", "model.safetensors", "pytorch_model.bin"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class ForeignFiles:
    """Contents of a foreign drafter's directory."""

    weights: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    sha256: dict[str, str]
    """Of each file, by its name."""


def read_files(directory: Path) -> ForeignFiles:
    """Read ``config.json`` and ``model.safetensors``, or ``pytorch_model.bin`` where there is none.

    Raises:
        PrismError: a file is missing or damaged, or holds something other than tensors of finite 16 or 32 bit floats.
    """
    directory = Path(directory)
    config_file = directory / CONFIG_FILE
    if not config_file.is_file():
        raise PrismError(f"{directory} has no {CONFIG_FILE}: pass the drafter's directory, with its config")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PrismError(f"{config_file} is not readable JSON ({error}): download it again") from None
    if not isinstance(config, dict):
        raise PrismError(f"{config_file} must hold a JSON object: download it again")
    weights = next((directory / name for name in (SAFETENSORS_FILE, TORCH_FILE) if (directory / name).is_file()), None)
    if weights is None:
        raise PrismError(f"{directory} has neither {SAFETENSORS_FILE} nor {TORCH_FILE}: download the drafter again")
    tensors = _read_safetensors(weights) if weights.name == SAFETENSORS_FILE else _read_torch(weights)
    hashes = {file.name: sha256_file(file) for file in (config_file, weights)}
    return ForeignFiles(weights, config, tensors, hashes)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise PrismError(f"{path} cannot be read ({error}): download it again") from None
    return _require_floats(tensors, path)


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise PrismError(
            f"{path} cannot be read, because it holds more than tensors or is damaged: save its state dict alone, with "
            "torch.save"
        ) from None
    except (OSError, RuntimeError, EOFError):
        if not zipfile.is_zipfile(path):
            raise PrismError(
                f"{path} cannot be read, because it is truncated or not of torch.save's present format: download it "
                "again, or save its state dict with torch.save again"
            ) from None
        raise PrismError(f"{path} cannot be read, because it is damaged: download it again") from None
    if not isinstance(tensors, dict):
        raise PrismError(f"{path} holds a {type(tensors).__name__} and not a state dict: save the state dict alone")
    return _require_floats(tensors, path)


def _require_floats(tensors: dict[str, Any], path: Path) -> dict[str, Tensor]:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise PrismError(f"{path}: {name} is a {type(value).__name__} and not a tensor: save the state dict alone")
        if value.dtype not in _DTYPES and name not in ("d2t", "t2d"):  # EAGLE-3's, refused by name later
            raise PrismError(
                f"{path}: {name} is of type {value.dtype}: pass a drafter that is not quantised (float16, bfloat16 or "
                "float32)"
            )
        if value.is_floating_point() and value.numel() and not all(bool(bound.isfinite()) for bound in value.aminmax()):
            raise PrismError(f"{path}: {name} holds values that are not finite: download it again, or train it again")
    return tensors
