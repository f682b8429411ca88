"""Engines over tiny models that several test files run."""

from __future__ import annotations

import torch

from prism_trt.engines.loading import make_engine
from prism_trt.engines.protocol import Engine, EngineLimits
from prism_trt.engines.torch_engine import TorchEngine
from tests.tiny import tiny_drafter, tiny_target

ENGINES = ("torch", "default")


def tiny_engine(kind: str, limits: EngineLimits) -> Engine:
    """An engine of one of `ENGINES`: plain torch, or what a build gives on this machine."""
    target = tiny_target()
    drafter = tiny_drafter(target)
    if kind == "torch":
        return TorchEngine(target, drafter, limits, torch.device("cpu"))
    return make_engine(target, drafter, limits, threads=1)
