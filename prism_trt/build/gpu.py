"""Engines for NVIDIA GPUs: networks compiled by TensorRT-RTX, which needs no GPU, or by TensorRT beside one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from prism_trt.build.plan import BuildPlan, own_versions
from prism_trt.build.profile import GpuProfile
from prism_trt.convert.compile import compile_network, serving_profile
from prism_trt.convert.drafter import drafter_linears, emit_round, emit_step
from prism_trt.convert.graph import Emitted
from prism_trt.convert.layers import (
    copied_weights,
    expanded_heads,
    fused_attentions,
    parse_layers,
    quantized_products,
)
from prism_trt.convert.quantized import quantized_matrices
from prism_trt.convert.target import emit_target, target_linears
from prism_trt.engines.manifest import GpuEngine, NetworkReport
from prism_trt.engines.tensorrt.binding import NetworkLimits
from prism_trt.engines.tensorrt.files import BINDINGS, DRAFT_VOCAB, ROUND, STEP, TARGET, plan_file
from prism_trt.errors import PrismError
from prism_trt.progress import progress
from prism_trt.quantize.scales import save_scales
from prism_trt.target.config import TargetConfig

_RESERVE = 0.1
"""Share of the GPU's memory left to activations and the runtime itself."""


def gpu_limits(plan: BuildPlan, settings: GpuProfile) -> NetworkLimits:
    """What the networks of `plan` are built for.

    Raises:
        PrismError: weights and K/V do not fit the GPU of `settings`.
    """
    limits = NetworkLimits(plan.slots, plan.context, min(settings.prefill_tokens, plan.context), plan.tree.size)
    _require_memory(plan, settings, limits)
    return limits


def compiles_here(settings: GpuProfile) -> bool:
    """Whether this machine can compile for the GPU of `settings`: TensorRT itself needs that GPU."""
    if settings.runtime == "tensorrt-rtx":
        return True
    if not torch.cuda.is_available():
        return False
    return "{}.{}".format(*torch.cuda.get_device_capability()) == settings.compute_capability


def write_gpu_engine(plan: BuildPlan, settings: GpuProfile, limits: NetworkLimits) -> dict[str, Any]:
    """Compile the networks of `plan` for the GPU of `settings`; returns the engine's own fields of the manifest.

    Raises:
        PrismError: the bindings are not installed, TensorRT refuses a network, or the plan is not what it should be
            (attention not fused, K/V copied to every head, weights of the round network copied, quantised matrices
            widened).
    """
    trt = import_tensorrt(settings.runtime)
    dtype = getattr(torch, plan.dtype or settings.dtypes[0])
    capability = None
    if settings.runtime == "tensorrt-rtx":
        capability = f"SM{settings.compute_capability.replace('.', '')}"
    reports = {}
    for name, network in _networks(trt, plan, limits, dtype):
        with progress(f"compiling {name}") as reporter:
            dump = compile_network(
                network, serving_profile(limits), plan.directory / plan_file(name), capability, reporter
            )
        reports[name] = _checked(name, dump, network)
    if plan.quantized is not None:
        save_scales(plan.quantized.scales, plan.directory)
    if plan.drafter is not None and plan.drafter.draft_vocab is not None:
        save_file({"draft_vocab": plan.drafter.draft_vocab.to(torch.int32)}, plan.directory / DRAFT_VOCAB)
        (plan.directory / DRAFT_VOCAB).chmod(0o644)
    return {
        "runtime": settings.runtime,
        "dtype": str(dtype).removeprefix("torch."),
        "isa": None,
        "cpu_flags": (),
        "versions": own_versions() | {settings.runtime: trt.__version__},
        "limits": limits.engine,
        "latency_ms": None,
        "gpu": GpuEngine(
            compute_capability=settings.compute_capability,
            networks=reports,
            limits=limits,
            quantization=None if plan.quantized is None else plan.quantized.report,
        ),
    }


def import_tensorrt(runtime: str) -> Any:
    """The Python bindings of `runtime`; both have the network API that networks are emitted through.

    Raises:
        PrismError: they are not installed.
    """
    try:
        return importlib.import_module(BINDINGS[runtime])
    except ImportError:
        raise PrismError(f"this needs {runtime}: install it with pip install 'prism-trt[{runtime}]'") from None


def _pool_bytes(config: TargetConfig, limits: NetworkLimits) -> int:
    """Size of the target's K/V pool in a type of two bytes."""
    return 4 * config.num_layers * limits.slots * config.num_kv_heads * limits.capacity * config.head_dim


def _require_memory(plan: BuildPlan, settings: GpuProfile, limits: NetworkLimits) -> None:
    """Refuse what cannot fit: weights (of drafter networks, too) and the K/V pool, in two bytes per number.

    Quantised matrices take one, but the step network has its own, wider copy of a drafter's.

    Raises:
        PrismError: they do not fit the GPU's memory.
    """
    weights = sum(parameter.numel() for parameter in plan.target.model.parameters())
    if plan.drafter is not None:
        # Step and round networks each hold the modules, the embedding and the draft head.
        own = sum(parameter.numel() for parameter in plan.drafter.parameters())
        table = plan.target.config.vocab_size + (plan.drafter.config.draft_vocab_size or 0)
        weights += 2 * (own + table * plan.drafter.config.hidden_size)
    spared = sum(part.weight.numel() for parts in _quantized_linears(plan) for part in parts)
    need = (2 * weights - spared + _pool_bytes(plan.target.config, limits)) / 2**30
    room = settings.memory_gib * (1 - _RESERVE)
    if need > room:
        raise PrismError(
            f"weights and K/V need {need:.1f} GiB but {settings.name} has room for {room:.1f}: lower --slots "
            f"({limits.slots}) or --context ({limits.context})"
        )


def _quantized_linears(plan: BuildPlan) -> Iterator[list[nn.Linear]]:
    """Linear layers whose matrices are stored in 8 bits by one network."""
    linears = target_linears(plan.target.model)
    if plan.drafter is not None:
        linears |= drafter_linears(plan.drafter)
    return (parts for name, parts in linears.items() if name in plan.scales)


def _networks(trt: Any, plan: BuildPlan, limits: NetworkLimits, dtype: torch.dtype) -> Iterator[tuple[str, Emitted]]:
    """The networks by name, one at a time, because each holds a copy of its weights."""
    model, drafter = plan.target.model, plan.drafter
    scales = plan.scales
    yield TARGET, emit_target(trt, model, drafter, limits.capacity, dtype, scales)
    if drafter is not None:
        yield STEP, emit_step(trt, drafter, model, limits.capacity, dtype, scales=scales)
        yield ROUND, emit_round(trt, drafter, model, plan.tree, limits.capacity, dtype, scales)


def _checked(name: str, dump: str, network: Emitted) -> NetworkReport:
    """What the builder made of `network`.

    Raises:
        PrismError: it is slower than it should be.
    """
    layers = parse_layers(dump)
    attentions, copied = len(fused_attentions(layers)), tuple(sorted(set(copied_weights(layers))))
    products, asked = len(quantized_products(layers)), quantized_matrices(network)
    wrong = None
    if not attentions:
        wrong = "has no fused attention"
    elif expanded_heads(layers):
        wrong = "copies keys and values to every head"
    elif name != STEP and copied:
        wrong = f"copies the weights {copied[0]} on every call"
    elif products != asked:
        wrong = f"multiplies with {products} matrices of 8 bits instead of {asked}"
    if wrong:
        raise PrismError(f"TensorRT's plan of the {name} network {wrong}: build with the version the project names")
    return NetworkReport(
        layers=len(layers), fused_attentions=attentions, copied_weights=copied, quantized_products=products
    )
