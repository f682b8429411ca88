"""The files of a compiled cpu engine: what it supports, writing them, and opening them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from prism_trt.drafter.features import fed_layers
from prism_trt.engines.cpu.engine import CpuEngine
from prism_trt.engines.cpu.library import Dims, Isa, best_isa, compile_library, cpu_flags, find_compiler
from prism_trt.engines.cpu.packing import packed_tensors, write_weights
from prism_trt.engines.protocol import EngineLimits

if TYPE_CHECKING:
    from prism_trt.config import DrafterConfig
    from prism_trt.drafter.model import Drafter
    from prism_trt.target.config import TargetConfig
    from prism_trt.target.loading import Target

LIBRARY, WEIGHTS, DRAFT_VOCAB = "engine.so", "weights.bin", "draft_vocab.safetensors"
_HEAD_DIMS = (16, 32, 64, 80, 96, 128)


def unsupported(target: TargetConfig, drafter: DrafterConfig | None) -> str | None:
    """Why the kernels cannot run these shapes, as half a sentence; None when they can."""
    for config in (target, drafter):
        if config is None:
            continue
        if config.head_dim not in _HEAD_DIMS:
            return f"head_dim {config.head_dim} is not one of {', '.join(map(str, _HEAD_DIMS))}"
        if config.hidden_size % 16 or config.intermediate_size % 16:
            return "hidden_size and intermediate_size are not multiples of 16"
    return None


def choose_isa() -> tuple[Isa, str] | None:
    """The best instruction set of this machine and a compiler for it; None without a compiler."""
    compiler = find_compiler()
    return None if compiler is None else (best_isa(cpu_flags()), compiler)


def dims(target: TargetConfig, drafter: DrafterConfig | None, limits: EngineLimits, threads: int) -> Dims:
    """The sizes the library is opened with."""
    sizes = Dims(
        vocab=target.vocab_size,
        hidden=target.hidden_size,
        intermediate=target.intermediate_size,
        layers=target.num_layers,
        heads=target.num_heads,
        kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        qkv_bias=int(target.qkv_bias),
        context=limits.context,
        slots=limits.slots,
        tokens=limits.tokens_per_call,
        threads=threads,
        rms_eps=target.rms_norm_eps,
    )
    if drafter is not None:
        sizes.modules = drafter.num_modules
        sizes.draft_hidden = drafter.hidden_size
        sizes.draft_layers = drafter.num_layers
        sizes.draft_vocab = drafter.draft_vocab_size or target.vocab_size
        sizes.draft_intermediate = drafter.intermediate_size
        sizes.draft_heads = drafter.num_heads
        sizes.draft_kv_heads = drafter.num_kv_heads
        sizes.draft_head_dim = drafter.head_dim
        sizes.draft_is_lm = int(drafter.kind == "standard")
        sizes.draft_bias = int(drafter.fc_bias and drafter.kind != "standard")
        sizes.draft_fusion = int(drafter.features == "multi")
        sizes.draft_feature_norm = int(drafter.normalize_features)
        sizes.draft_rms_eps = drafter.rms_norm_eps
    return sizes


def write_files(
    directory: Path, target: Target, drafter: Drafter | None, context: int, isa: Isa, compiler: str
) -> None:
    """Compile the library and pack the weights into `directory`.

    Raises:
        PrismError: the compiler failed.
    """
    compile_library(directory / LIBRARY, isa, compiler)
    write_weights(directory / WEIGHTS, packed_tensors(target, drafter, context))
    if drafter is not None and drafter.draft_vocab is not None:
        save_file({"draft_vocab": drafter.draft_vocab.to(torch.int32)}, directory / DRAFT_VOCAB)


def open_files(
    directory: Path,
    target: TargetConfig,
    drafter: DrafterConfig | None,
    limits: EngineLimits,
    threads: int,
    feature_layers: tuple[int, ...] | None = None,
) -> CpuEngine:
    """Load what `write_files` wrote.

    Args:
        feature_layers: numbers of the hidden states to give as features; None for those the drafter is fed.

    Raises:
        PrismError: the files do not fit the sizes.
    """
    draft_vocab = None
    if drafter is not None and drafter.draft_vocab_size is not None:
        draft_vocab = load_file(directory / DRAFT_VOCAB)["draft_vocab"].long()
    step_map = drafter.step_map if drafter is not None else ()
    sizes = dims(target, drafter, limits, threads)
    features = feature_layers or fed_layers(target, drafter)
    return CpuEngine(directory / LIBRARY, directory / WEIGHTS, sizes, step_map, features, draft_vocab)


def open_temporary(
    target: Target,
    drafter: Drafter | None,
    limits: EngineLimits,
    threads: int,
    isa: Isa,
    compiler: str,
    feature_layers: tuple[int, ...] | None = None,
) -> CpuEngine:
    """Write the files to a temporary directory, load them, and remove them."""
    with tempfile.TemporaryDirectory(prefix="prism_trt_engine_") as name:
        directory = Path(name)
        write_files(directory, target, drafter, limits.context, isa, compiler)
        config = drafter.config if drafter else None
        return open_files(directory, target.config, config, limits, threads, feature_layers)
