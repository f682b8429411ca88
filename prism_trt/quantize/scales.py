"""Scales of quantised linear layers: a stored value times its scale is the value that is meant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prism_trt.errors import PrismError

Quantization = Literal["fp8", "int8"]
"""``fp8``: weights and activations in E4M3, one scale per tensor. ``int8``: the target's weights, one scale per row."""

DRAFTED: tuple[Quantization, ...] = ("fp8",)
"""The kinds that apply to the drafter. INT8 weights alone do not: where the round network uses a module in several
steps, TensorRT widens them into a copy first; and INT8 activations cost a part of the acceptance length."""

STORED: Mapping[Quantization, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""What matrices are stored in."""

SCALES_FILE = "scales.safetensors"
_WEIGHT, _ACTIVATION = ".weight", ".activation"


@dataclass(frozen=True)
class LinearScales:
    """Scales of one matrix [O, I] of a network."""

    dtype: torch.dtype
    """What the matrix is stored in."""
    weight: Tensor
    """float32, [] or [O]."""
    activation: Tensor | None
    """float32 [], of what the matrix is multiplied with; None leaves that as it is."""


Scales = Mapping[str, LinearScales]
"""By the names that matrices have in networks, as ``layers.0.qkv`` and ``modules.1.fc``; the rest is not quantised."""

UNQUANTIZED: Scales = MappingProxyType({})
"""The scales of a network whose matrices have its own type."""


def largest(dtype: torch.dtype) -> float:
    """The magnitude that scales map the largest value to."""
    return torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max


def to_quantized(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``values / scale`` rounded to the nearest value of `dtype`, ties to even, saturating."""
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    scaled = values.float() / scale
    return (scaled if dtype.is_floating_point else scaled.round()).clamp(info.min, info.max).to(dtype)


def save_scales(scales: Scales, directory: Path) -> None:
    """Write `scales` to `SCALES_FILE` in `directory`."""
    tensors = {name + _WEIGHT: linear.weight for name, linear in scales.items()}
    tensors |= {name + _ACTIVATION: each.activation for name, each in scales.items() if each.activation is not None}
    save_file(tensors, directory / SCALES_FILE)
    (directory / SCALES_FILE).chmod(0o644)


def load_scales(directory: Path, quantization: Quantization) -> Scales:
    """Read what `save_scales` wrote for `quantization`.

    Raises:
        PrismError: the file is missing or damaged.
    """
    path = Path(directory) / SCALES_FILE
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise PrismError(f"{path} cannot be read ({error}): copy or build {directory} again") from None
    names = [name.removesuffix(_WEIGHT) for name in tensors if name.endswith(_WEIGHT)]
    stored = STORED[quantization]
    return {name: LinearScales(stored, tensors[name + _WEIGHT], tensors.get(name + _ACTIVATION)) for name in names}
