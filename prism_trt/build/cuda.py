"""Engines for any NVIDIA GPU: the models themselves, which PyTorch runs with CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch

from prism_trt.build.latency import measure
from prism_trt.build.plan import BuildPlan, own_versions
from prism_trt.build.profile import CudaProfile
from prism_trt.drafter.checkpoint import save_drafter
from prism_trt.engines.loading import DRAFTER_DIRECTORY, TARGET_DIRECTORY, cuda_engine
from prism_trt.engines.protocol import EngineLimits
from prism_trt.target.loading import save_hf


def write_cuda_engine(plan: BuildPlan, settings: CudaProfile) -> dict[str, Any]:
    """Write the models of `plan`; returns the engine's own fields of the manifest.

    Latencies are measured when this machine has a GPU; the engine can be written without one.
    """
    dtype = plan.dtype or settings.dtypes[0]
    limits = EngineLimits(plan.slots, plan.context, settings.tokens_per_call)
    save_hf(plan.target, plan.directory / TARGET_DIRECTORY)
    if plan.drafter is not None:
        save_drafter(plan.drafter, plan.directory / DRAFTER_DIRECTORY)
    latency = None
    if torch.cuda.is_available():
        latency = measure(cuda_engine(plan.target, plan.drafter, limits, getattr(torch, dtype)))
    return {
        "runtime": settings.runtime,
        "dtype": dtype,
        "isa": None,
        "cpu_flags": (),
        "versions": own_versions(),
        "limits": limits,
        "latency_ms": latency,
    }
