"""`engine.json`: what an engine directory was built from and for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from prism_trt.config import DrafterConfig, StrictModel, TreeShape, parse
from prism_trt.engines.latency import LatencyTable
from prism_trt.engines.protocol import EngineLimits
from prism_trt.engines.tensorrt.binding import NetworkLimits
from prism_trt.manifest import own_fields, read_manifest
from prism_trt.quantize.report import QuantizationReport
from prism_trt.target.config import TargetConfig

ENGINE_MANIFEST = "engine.json"
ENGINE_KIND = "engine"

Runtime = Literal["cpp", "torch", "torch-cuda", "tensorrt-rtx", "tensorrt"]


class NetworkReport(StrictModel):
    """What TensorRT's builder made of a network."""

    layers: int
    fused_attentions: int
    copied_weights: tuple[str, ...] = Field(description="weights that a layer copies on every call")
    quantized_products: int = Field(description="layers that multiply with an 8-bit matrix")


class GpuEngine(StrictModel):
    """What an engine for a GPU has besides."""

    compute_capability: str
    networks: dict[str, NetworkReport] = Field(description="by file name without its suffix")
    limits: NetworkLimits
    quantization: QuantizationReport | None = None


class EngineManifest(StrictModel):
    """The engine's own fields of `engine.json`."""

    profile: str
    runtime: Runtime
    dtype: Literal["bfloat16", "float16", "float32"]
    isa: str | None
    """Instruction set of the compiled library; None for the torch runtime."""
    cpu_flags: tuple[str, ...]
    """Processor features the library needs."""
    versions: dict[str, str]
    target: TargetConfig
    target_fingerprint: str
    drafter: DrafterConfig | None
    drafter_sha256: str | None
    limits: EngineLimits
    default_tree: TreeShape
    latency_ms: LatencyTable | None
    """None for an engine that was built on another machine than it runs on."""
    gpu: GpuEngine | None = None


def read_engine_manifest(path: Path) -> EngineManifest:
    """Read and check the manifest of the engine directory `path`.

    Raises:
        PrismError: it is missing, damaged, of another version, or a file of the engine is missing or truncated.
    """
    fields = own_fields(read_manifest(path, ENGINE_MANIFEST, ENGINE_KIND))
    return parse(EngineManifest, fields, str(Path(path) / ENGINE_MANIFEST))
