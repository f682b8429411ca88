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
from prism_trt.config import DrafterConfig
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
from prism_trt.convert.plugins import Plugins
from prism_trt.convert.quantized import quantized_matrices
from prism_trt.convert.scratch import scratch_files
from prism_trt.convert.target import emit_target, target_linears
from prism_trt.drafter.model import Drafter
from prism_trt.engines.manifest import GpuEngine, NetworkReport
from prism_trt.engines.tensorrt.binding import NetworkLimits
from prism_trt.engines.tensorrt.files import BINDINGS, DRAFT_VOCAB, KERNELS, ROUND, STEP, TARGET, plan_file
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
    plugins = step_plugins(plan, settings, limits) if settings.runtime == "tensorrt" else None
    for name, network in _networks(trt, plan, limits, dtype, plugins):
        with progress(f"compiling {name}") as reporter:
            dump = compile_network(
                network, serving_profile(limits), plan.directory / plan_file(name), capability, reporter
            )
        if settings.runtime == "tensorrt-rtx":  # TensorRT itself logs no such dump
            reports[name] = _checked(name, dump, network)
        del network  # and its constants, before the next ones are made
    if plan.quantized is not None:
        save_scales(plan.quantized.scales, plan.directory)
    if plan.drafter is not None and plan.drafter.draft_vocab is not None:
        save_file({"draft_vocab": plan.drafter.draft_vocab.to(torch.int32)}, plan.directory / DRAFT_VOCAB)
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


def step_plugins(plan: BuildPlan, settings: GpuProfile, limits: NetworkLimits) -> Plugins:
    """What the step network's plugins are made for; their kernels are kept beside the plans."""
    capability = int(settings.compute_capability.replace(".", ""))
    return Plugins(limits.slots, capability, plan.directory / KERNELS)


def import_tensorrt(runtime: str) -> Any:
    """The Python bindings of `runtime`; both have the network API that networks are emitted through.

    Raises:
        PrismError: they are not installed.
    """
    try:
        return importlib.import_module(BINDINGS[runtime])
    except ImportError:
        raise PrismError(f"this needs {runtime}: install it with pip install 'prism-trt[{runtime}]'") from None


def _pool_numbers(config: TargetConfig | DrafterConfig, limits: NetworkLimits) -> int:
    """Numbers in the K/V pool."""
    return 2 * config.num_layers * limits.slots * config.num_kv_heads * limits.capacity * config.head_dim


def _drafter_numbers(drafter: Drafter, target: TargetConfig) -> int:
    """Numbers in the constants of one network of `drafter`: its modules, the embedding and the draft head."""
    own = sum(parameter.numel() for parameter in drafter.parameters())
    if drafter.config.kind == "standard":
        return own
    shares = target.tie_word_embeddings and drafter.draft_vocab is None
    head = 0 if shares else drafter.config.draft_vocab_size or target.vocab_size
    return own + (target.vocab_size + head) * target.hidden_size


def _require_memory(plan: BuildPlan, settings: GpuProfile, limits: NetworkLimits) -> None:
    """Refuse what cannot fit: weights (of both drafter networks, too) and the K/V pools, in two bytes per number.

    Quantised matrices take one, but the step network has its own, wider copy of a drafter's.

    Raises:
        PrismError: they do not fit the GPU's memory.
    """
    target, drafter = plan.target.config, plan.drafter
    numbers = sum(parameter.numel() for parameter in plan.target.model.parameters())
    entries = _pool_numbers(target, limits)
    if drafter is not None:
        numbers += 2 * _drafter_numbers(drafter, target)
        entries += _pool_numbers(drafter.config, limits)
    spared = sum(part.weight.numel() for parts in _quantized_linears(plan) for part in parts)
    weights, pools = (2 * numbers - spared) / 2**30, 2 * entries / 2**30
    room = settings.memory_gib * (1 - _RESERVE)
    if weights >= room:
        instead = " or ".join(("a GPU with more memory", *(f"--{name}" for name in settings.quantizations)))
        raise PrismError(
            f"the weights need {weights:.1f} GiB but {settings.name} has room for {room:.1f}: use {instead}"
        )
    if weights + pools > room:
        raise PrismError(
            f"weights and K/V need {weights:.1f} + {pools:.1f} GiB but {settings.name} has room for {room:.1f}: lower "
            f"--slots ({limits.slots}) or --context ({limits.context})"
        )


def _quantized_linears(plan: BuildPlan) -> Iterator[list[nn.Linear]]:
    """Linear layers whose matrices are stored in 8 bits by one network."""
    linears = target_linears(plan.target.model)
    if plan.drafter is not None:
        linears |= drafter_linears(plan.drafter)
    return (parts for name, parts in linears.items() if name in plan.scales)


def _networks(
    trt: Any, plan: BuildPlan, limits: NetworkLimits, dtype: torch.dtype, plugins: Plugins | None
) -> Iterator[tuple[str, Emitted]]:
    """The networks by name, one at a time, because each holds a copy of its weights."""
    model, drafter = plan.target.model, plan.drafter
    scales = plan.scales
    place = scratch_files(plan.directory, model)
    if drafter is not None:
        for parameter in drafter.parameters():
            parameter.data = place(parameter.data)  # not read until the target is built
    with progress("reading layers of the target", model.config.num_layers) as reporter:
        target = emit_target(trt, model, drafter, limits.capacity, dtype, scales, place, reporter)
    yield TARGET, target
    del target
    if drafter is not None:
        yield STEP, emit_step(trt, drafter, model, limits.capacity, dtype, scales, plugins)
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
