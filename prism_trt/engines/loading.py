"""Open engine directories, or make an engine straight from a loaded model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from prism_trt.engines.cpu.files import choose_isa, open_files, open_temporary, unsupported
from prism_trt.engines.cpu.library import cpu_flags
from prism_trt.engines.manifest import read_engine_manifest
from prism_trt.engines.protocol import Engine, EngineLimits
from prism_trt.errors import PrismError
from prism_trt.speculative.acceptance import AcceptancePrior
from prism_trt.speculative.planner import Planner
from prism_trt.target.tokenizer import Tokenizer

if TYPE_CHECKING:
    from prism_trt.drafter.model import Drafter
    from prism_trt.engines.torch_engine import TorchEngine
    from prism_trt.target.loading import Target

TOKENIZER_DIRECTORY, TARGET_DIRECTORY, DRAFTER_DIRECTORY = "tokenizer", "target", "drafter"
CPU = torch.device("cpu")
_MOST_THREADS = 16


def default_threads() -> int:
    """Processors this process may use, at most 16: decoding is bound by memory long before that."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MOST_THREADS)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Leave torch so many threads meanwhile.

    Beside a compiled engine, 1: it has threads of its own, and torch's would wait for the same processors.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_engine(path: Path, threads: int | None = None, slots: int | None = None) -> Engine:
    """Load the engine directory `path`, and leave torch the threads that it needs for this engine: one if compiled.

    Args:
        path: what `prism_trt.build` wrote.
        threads: compute threads; `default_threads()` when None.
        slots: concurrent requests; the manifest's limit when None.

    Raises:
        PrismError: the directory is not a sound engine, or was compiled for a processor with other instructions, or for
            a GPU that is not here.
    """
    path = Path(path)
    manifest = read_engine_manifest(path)
    threads = threads or default_threads()
    limits = replace(manifest.limits, slots=slots or manifest.limits.slots)
    if missing := sorted(set(manifest.cpu_flags) - cpu_flags()):
        raise PrismError(
            f"{path} was compiled for a processor with {', '.join(missing)}, which this one lacks: build it here"
        )
    if manifest.gpu is not None:
        from prism_trt.engines.tensorrt.runtime import open_engine

        return open_engine(path, manifest)
    if manifest.runtime == "cpp":
        engine = open_files(path, manifest.target, manifest.drafter, limits, threads)
        torch.set_num_threads(1)  # for as long as the process serves it: see `torch_threads`
        engine.default_tree = manifest.default_tree
        return engine

    from prism_trt.drafter.checkpoint import load_drafter
    from prism_trt.engines.torch_engine import TorchEngine
    from prism_trt.target.loading import load_target

    torch.set_num_threads(threads)
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    on_gpu = manifest.runtime == "torch-cuda"
    if on_gpu and not torch.cuda.is_available():
        raise PrismError(f"{path} runs on an NVIDIA GPU, but torch finds none here: build it with --gpu cpu")
    target = load_target(path / TARGET_DIRECTORY, dtype)
    drafter = load_drafter(path / DRAFTER_DIRECTORY, target, dtype) if manifest.drafter else None
    if on_gpu:
        torch_engine = cuda_engine(target, drafter, limits, dtype)
    else:
        torch_engine = TorchEngine(target, drafter, limits, CPU, dtype)
    torch_engine.default_tree = manifest.default_tree
    return torch_engine


def cuda_engine(
    target: Target,
    drafter: Drafter | None,
    limits: EngineLimits,
    dtype: torch.dtype,
    feature_layers: tuple[int, ...] | None = None,
) -> TorchEngine:
    """An engine on the current CUDA device, computing in `dtype` by CUDA graphs."""
    from prism_trt.engines.cuda_graphs import GraphedTorchEngine
    from prism_trt.engines.recordings import CudaGraphs

    device = torch.device("cuda", torch.cuda.current_device())
    return GraphedTorchEngine(target, drafter, limits, device, dtype, CudaGraphs(), feature_layers)


def load_engine_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of the engine directory `path`."""
    return Tokenizer.load(Path(path) / TOKENIZER_DIRECTORY)


def load_planner(path: Path, engine: Engine) -> Planner:
    """A planner for `engine`, which was loaded from the directory `path` and is idle.

    Its latency table is the one that the build measured, or is measured now, in a few seconds, where the engine was
    built elsewhere.
    """
    manifest = read_engine_manifest(path)
    table = manifest.latency_ms
    if table is None:
        from prism_trt.build.latency import measure

        table = measure(engine)
    return Planner(engine, table, AcceptancePrior.of(manifest.drafter))


def make_engine(
    target: Target,
    drafter: Drafter | None,
    limits: EngineLimits,
    threads: int | None = None,
    feature_layers: tuple[int, ...] | None = None,
    device: torch.device = CPU,
) -> Engine:
    """An engine for a loaded model without an engine directory.

    Args:
        feature_layers: numbers of the hidden states to give as features; None for those the drafter is fed.
        device: a CUDA device computes in bfloat16; the CPU as compiled code, or where that is not possible by torch in
            float32.

    Raises:
        PrismError: the context is longer than the positions the target knows.
    """
    limits.check_positions(target.config.max_position_embeddings)
    if device.type == "cuda":
        return cuda_engine(target, drafter, limits, torch.bfloat16, feature_layers)
    chosen = choose_isa()
    if chosen and not unsupported(target.config, drafter.config if drafter else None):
        return open_temporary(target, drafter, limits, threads or default_threads(), *chosen, feature_layers)

    from prism_trt.engines.torch_engine import TorchEngine

    return TorchEngine(target, drafter, limits, CPU, torch.float32, feature_layers)
