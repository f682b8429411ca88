"""Build an engine directory from a target and a drafter."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from prism_trt.build.bundle import BUNDLED_RUNTIME, BundleManifest, bundled_quantization, read_bundle, write_bundle
from prism_trt.build.bundle import MANIFEST as BUNDLE_MANIFEST
from prism_trt.build.cuda import write_cuda_engine
from prism_trt.build.gpu import compiles_here, gpu_limits, import_tensorrt, write_gpu_engine
from prism_trt.build.latency import measure
from prism_trt.build.plan import BuildPlan, own_versions
from prism_trt.build.profile import AnyProfile, CpuProfile, CudaProfile, GpuProfile, load_profile
from prism_trt.config import TreeShape
from prism_trt.drafter.checkpoint import load_drafter, save_drafter
from prism_trt.drafter.model import Drafter
from prism_trt.engines.cpu.files import choose_isa, open_files, unsupported, write_files
from prism_trt.engines.loading import (
    DRAFTER_DIRECTORY,
    TARGET_DIRECTORY,
    TOKENIZER_DIRECTORY,
    default_threads,
    torch_threads,
)
from prism_trt.engines.manifest import ENGINE_KIND, ENGINE_MANIFEST, EngineManifest
from prism_trt.engines.protocol import Engine, EngineLimits
from prism_trt.engines.tensorrt.files import KERNELS
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from prism_trt.manifest import atomic_directory, has_any, sha256_file, write_manifest
from prism_trt.quantize.quantization import quantize
from prism_trt.quantize.report import Quantized
from prism_trt.quantize.scales import Quantization
from prism_trt.target.loading import Target, load_target, save_hf


def build_engine(
    *,
    profile: str = "cpu",
    runtime: str | None = None,
    target: Path,
    drafter: Path | None,
    out: Path,
    tree: TreeShape | None = None,
    context: int | None = None,
    slots: int | None = None,
    dtype: str | None = None,
    quantization: Quantization | None = None,
    calibration: Path | None = None,
    quantized: Quantized | None = None,
    kernels: Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> EngineManifest | BundleManifest:
    """Build the engine of `profile` for `target` (HF directory or GGUF file) and `drafter` (checkpoint directory).

    Where the profile's compiler needs a GPU that is not here, a bundle is written instead (see `finish_bundle`).

    Args:
        profile: name of a file in `build/`.
        runtime: of an engine for a GPU; the profile's when None.
        target: the model to reproduce.
        drafter: its drafter; None builds an engine that can only decode plainly.
        out: the engine directory; replaced only when `overwrite` is true, and never left half-written.
        tree: default draft tree; the profile's when None.
        context: K/V entries per request; the profile's (at most the target's own) when None.
        slots: concurrent requests; the profile's when None.
        dtype: of the computation; the profile's first when None.
        quantization: of the matrices; the profile says which there are, None leaves them in `dtype`.
        calibration: prompts that it is calibrated and measured with.
        quantized: the result of an earlier calibration, instead of the two.
        kernels: directory of compiled plugins; None compiles them.
        overwrite: replace an existing `out`.
        say: receives one-sentence remarks, such as falling back to torch, or what a quantisation costs.

    Raises:
        PrismError: bad input, or the drafter is not the target's.
    """
    settings = load_profile(profile, runtime)
    _require_quantization(settings, quantization, calibration)
    if dtype is not None and dtype not in settings.dtypes:
        raise PrismError(
            f"profile {profile} computes in {' or '.join(settings.dtypes)}, not in {dtype}: pass one of them as --dtype"
        )
    with atomic_directory(out, overwrite, has_any(ENGINE_MANIFEST, BUNDLE_MANIFEST)) as directory:
        of_target, of_drafter = _weight_types(settings, dtype, quantization)
        model = load_target(target, of_target)
        draft = load_drafter(drafter, model, of_drafter) if drafter is not None else None
        longest = model.config.max_position_embeddings
        if context is not None and context > longest:
            raise PrismError(f"--context {context} is more than the target's {longest} positions: choose a smaller one")
        context = context or min(settings.context, longest)
        shape = tree or settings.default_tree
        if quantization is not None and calibration is not None:
            quantized = quantize(model, draft, calibration, quantization, shape.depth)
            say(str(quantized.report))
        plan = BuildPlan(directory, model, draft, shape, context, slots or settings.slots, dtype, quantized)
        model.tokenizer.save(directory / TOKENIZER_DIRECTORY)
        if isinstance(settings, GpuProfile):
            limits = gpu_limits(plan, settings)
            if kernels is not None:
                shutil.copytree(kernels, directory / KERNELS)
            if not compiles_here(settings):
                trt = import_tensorrt("tensorrt-rtx")
                return write_bundle(trt, plan, settings, limits, plan.dtype or settings.dtypes[0])
            fields = write_gpu_engine(plan, settings, limits)
        elif isinstance(settings, CudaProfile):
            fields = write_cuda_engine(plan, settings)
        else:
            fields = _write_cpu_engine(plan, settings, say)
        manifest = EngineManifest(
            profile=settings.name,
            target=model.config,
            target_fingerprint=model.fingerprint,
            drafter=draft.config if draft else None,
            drafter_sha256=sha256_file(drafter / "model.safetensors") if drafter is not None else None,
            default_tree=plan.tree,
            **fields,
        )
        write_manifest(directory, ENGINE_MANIFEST, ENGINE_KIND, manifest.model_dump(mode="json"))
    return manifest


def finish_bundle(bundle: Path, out: Path, overwrite: bool = False) -> EngineManifest:
    """Compile a bundle on the GPU that it is for.

    Raises:
        PrismError: `bundle` is not an intact bundle, or its GPU is not here.
    """
    manifest = read_bundle(bundle)
    settings = load_profile(manifest.profile, BUNDLED_RUNTIME)
    assert isinstance(settings, GpuProfile)
    if not compiles_here(settings):
        raise PrismError(
            f"{bundle} is for {settings.name}, which this machine does not have: run this command on a host with one"
        )
    drafter = bundle / DRAFTER_DIRECTORY if manifest.drafter is not None else None
    built = build_engine(
        profile=manifest.profile,
        runtime=BUNDLED_RUNTIME,
        target=bundle / TARGET_DIRECTORY,
        drafter=drafter,
        out=out,
        tree=manifest.default_tree,
        context=manifest.limits.context,
        slots=manifest.limits.slots,
        dtype=manifest.dtype,
        quantized=bundled_quantization(bundle, manifest),
        kernels=None if drafter is None else bundle / KERNELS,
        overwrite=overwrite,
    )
    assert isinstance(built, EngineManifest)
    return built


def _weight_types(
    settings: AnyProfile, dtype: str | None, quantization: Quantization | None
) -> tuple[torch.dtype | None, torch.dtype]:
    """The types to load the target's (None: as stored) and the drafter's weights in.

    Compiling converts the target's one by one; whatever computes on this machine does so in float32.
    """
    computed: torch.dtype = getattr(torch, dtype or settings.dtypes[0])
    if isinstance(settings, CudaProfile):
        return computed, computed
    if isinstance(settings, GpuProfile) and quantization is None and compiles_here(settings):
        return None, computed
    return torch.float32, torch.float32


def _require_quantization(settings: AnyProfile, quantization: Quantization | None, calibration: Path | None) -> None:
    """Refuse a quantisation that the profile does not have, or that nothing calibrates.

    Raises:
        PrismError: so.
    """
    if quantization is None and calibration is not None:
        raise PrismError("--calibration is for quantised engines: pass --fp8 or --int8, or leave it out")
    if quantization is None:
        return
    if quantization not in settings.quantizations:
        others = " or ".join(f"--{name}" for name in settings.quantizations)
        instead = f"pass {others}, or neither" if others else "leave it out"
        raise PrismError(f"profile {settings.name} has no {quantization}: {instead}")
    if calibration is None:
        raise PrismError(f"--{quantization} needs prompts to calibrate and measure with: pass --calibration FILE")


def _write_cpu_engine(plan: BuildPlan, settings: CpuProfile, say: Callable[[str], None]) -> dict[str, Any]:
    """Write the files of an engine for this machine; returns its own fields of the manifest."""
    model, draft = plan.target, plan.drafter
    limits = EngineLimits(plan.slots, plan.context, settings.tokens_per_call)
    reason = unsupported(model.config, draft.config if draft else None)
    chosen = None if reason else choose_isa()
    if chosen:
        isa, compiler = chosen
        write_files(plan.directory, model, draft, limits.context, isa, compiler)
        config = draft.config if draft else None
        engine: Engine = open_files(plan.directory, model.config, config, limits, default_threads())
    else:
        reason = reason or "there is no C++ compiler (install g++ for the fast engine)"
        say(f"The engine runs on torch in float32, because {reason}.")
        _write_torch_files(plan.directory, model, draft)
        engine = TorchEngine(model, draft, limits, torch.device("cpu"), torch.float32)
    with torch_threads(1) if chosen else nullcontext():
        latency = measure(engine)
    return {
        "runtime": "cpp" if chosen else "torch",
        "dtype": "bfloat16" if chosen else "float32",
        "isa": isa.name if chosen else None,
        "cpu_flags": tuple(sorted(isa.cpu_flags)) if chosen else (),
        "versions": _versions(compiler if chosen else None),
        "limits": limits,
        "latency_ms": latency,
    }


def _write_torch_files(directory: Path, target: Target, drafter: Drafter | None) -> None:
    save_hf(target, directory / TARGET_DIRECTORY)
    if drafter is not None:
        save_drafter(drafter, directory / DRAFTER_DIRECTORY)


def _versions(compiler: str | None) -> dict[str, str]:
    versions = own_versions()
    if compiler is not None:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
        versions["compiler"] = done.stdout.splitlines()[0]
    return versions
