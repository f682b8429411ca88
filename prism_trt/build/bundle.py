"""Bundles: everything an engine is made of, for a GPU whose compiler runs only beside it.

A bundle is built and checked anywhere; the GPU host compiles it with one command. It holds the weights in Hugging Face
spelling, the tokenizer, the drafter, the compiled plugins of the step network (PTX) and ``bundle.json``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prism_trt.build.gpu import step_plugins
from prism_trt.build.plan import BuildPlan, own_versions
from prism_trt.build.profile import GpuProfile
from prism_trt.config import DrafterConfig, StrictModel, TreeShape, parse
from prism_trt.convert.compile import serving_profile
from prism_trt.convert.drafter import emit_step
from prism_trt.convert.plugins import Plugins, compile_kernels
from prism_trt.convert.walker import make_walker_engine
from prism_trt.drafter.checkpoint import save_drafter
from prism_trt.engines.loading import DRAFTER_DIRECTORY, TARGET_DIRECTORY
from prism_trt.engines.protocol import Engine, TokenBatch
from prism_trt.engines.tensorrt.binding import NetworkLimits
from prism_trt.engines.tensorrt.names import CALL_TOKENS, ROWS
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from prism_trt.manifest import own_fields, read_manifest, write_manifest
from prism_trt.quantize.report import QuantizationReport, Quantized
from prism_trt.quantize.scales import load_scales, save_scales
from prism_trt.target.config import TargetConfig
from prism_trt.target.loading import save_hf

MANIFEST = "bundle.json"
KIND = "engine bundle"
BUNDLED_RUNTIME = "tensorrt"
"""The one whose compiler runs beside the GPU."""
_TOKENS = 8
_MOST_DEVIATION = {"float16": 0.02, "bfloat16": 0.15}
"""Root mean square error of logits over their size that rounding explains; a wrong network is off by about 1."""
_MOST_DEVIATION_QUANTIZED = 0.4
"""The same for quantised networks, whose cost on real text the calibration reports."""


class BundleManifest(StrictModel):
    """The bundle's own fields of ``bundle.json``."""

    profile: str
    dtype: str
    limits: NetworkLimits
    default_tree: TreeShape
    target: TargetConfig
    target_fingerprint: str
    drafter: DrafterConfig | None
    versions: dict[str, str]
    quantization: QuantizationReport | None
    deviation: dict[str, float]
    """Of each network's logits from torch's in float32, relative; the networks were evaluated on a processor."""


def write_bundle(trt: Any, plan: BuildPlan, settings: GpuProfile, limits: NetworkLimits, dtype: str) -> BundleManifest:
    """Check the networks of `plan` on this processor and write the bundle into its directory.

    Args:
        trt: a module with the network API of TensorRT 11.

    Raises:
        PrismError: a network does not compute what the model does.
    """
    target, drafter = plan.target, plan.drafter
    plugins = step_plugins(plan, settings, limits)
    deviation = _deviations(trt, plan, dtype, plugins)
    most, instead = _MOST_DEVIATION[dtype], "choose the other --dtype"
    if plan.quantized is not None:
        most, instead = _MOST_DEVIATION_QUANTIZED, f"leave out --{plan.quantized.report.quantization}"
    if wrong := {name: error for name, error in deviation.items() if error > most}:
        name, error = next(iter(wrong.items()))
        raise PrismError(
            f"the {name} network in {dtype} deviates by {error:.0%} from the model, more than rounding explains: "
            f"{instead}"
        )
    save_hf(target, plan.directory / TARGET_DIRECTORY)
    if drafter is not None:
        save_drafter(drafter, plan.directory / DRAFTER_DIRECTORY)
        profile = serving_profile(limits)
        step = emit_step(trt, drafter, target.model, limits.capacity, getattr(torch, dtype), plan.scales, plugins)
        compile_kernels(step, profile[ROWS].most * profile[CALL_TOKENS].most, plugins)
    if plan.quantized is not None:
        save_scales(plan.quantized.scales, plan.directory)
    manifest = BundleManifest(
        profile=settings.name,
        dtype=dtype,
        limits=limits,
        default_tree=plan.tree,
        target=target.config,
        target_fingerprint=target.fingerprint,
        drafter=drafter.config if drafter else None,
        versions=own_versions(),
        quantization=None if plan.quantized is None else plan.quantized.report,
        deviation=deviation,
    )
    write_manifest(plan.directory, MANIFEST, KIND, manifest.model_dump(mode="json"))
    return manifest


def read_bundle(path: Path) -> BundleManifest:
    """Read and check the manifest of the bundle `path`.

    Raises:
        PrismError: it is missing, damaged, or a file of the bundle is missing or truncated.
    """
    fields = own_fields(read_manifest(path, MANIFEST, KIND))
    return parse(BundleManifest, fields, str(Path(path) / MANIFEST))


def bundled_quantization(path: Path, manifest: BundleManifest) -> Quantized | None:
    """The scales that the bundle `path` carries; None when it is not quantised.

    Raises:
        PrismError: they cannot be read.
    """
    report = manifest.quantization
    return None if report is None else Quantized(load_scales(path, report.quantization), report)


def _deviations(trt: Any, plan: BuildPlan, dtype: str, plugins: Plugins) -> dict[str, float]:
    """Relative error of logits: a prefill of the target, then draft steps 0 and 1."""
    limits = NetworkLimits(1, 4 * _TOKENS, 2 * _TOKENS, plan.tree.size)
    exact = TorchEngine(plan.target, plan.drafter, limits.engine, torch.device("cpu"), torch.float32)
    plugins = replace(plugins, slots=limits.slots)
    walked = make_walker_engine(
        trt, plan.target, plan.drafter, limits, getattr(torch, dtype), scales=plan.scales, plugins=plugins
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, plan.target.config.vocab_size, (_TOKENS,), generator=generator)
    batch = TokenBatch.one_row(tokens, 0)
    expected, found = exact.forward(batch), walked.forward(batch)
    deviation = {"target": _error(found.logits, expected.logits)}
    if plan.drafter is not None:
        # The walked target fuses multi features itself, so each engine is fed with its own.
        first = [engine.extend(batch, output.features) for engine, output in ((exact, expected), (walked, found))]
        fed = TokenBatch.one_row(tokens[:1], _TOKENS)
        engines: tuple[Engine, Engine] = (exact, walked)
        second = [engine.step(1, fed, output.hidden) for engine, output in zip(engines, first, strict=True)]
        deviation["step"] = max(_error(b.logits, a.logits) for a, b in (first, second))
    return deviation


def _error(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    assert found is not None and expected is not None
    return float((found.float() - expected).norm() / expected.norm())
