"""Per-GPU build profiles, read from `build/*.toml`."""

from __future__ import annotations

import sys
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator

from prism_trt.config import StrictModel, TreeShape, parse
from prism_trt.errors import PrismError
from prism_trt.quantize.scales import Quantization
from prism_trt.resources import resource

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class _Profile(StrictModel):
    name: str
    default_tree: TreeShape
    context: int = Field(ge=16, description="K/V entries per request")
    slots: int = Field(ge=1, description="concurrent requests")
    quantizations: tuple[Quantization, ...] = Field((), description="what matrices can be stored in besides the dtype")

    @field_validator("default_tree", mode="before")
    @classmethod
    def _parse_tree(cls, value: object) -> object:
        return TreeShape.parse(value) if isinstance(value, str) else value


class CpuProfile(_Profile):
    """Build settings of the machine that builds."""

    runtime: Literal["cpp"]
    dtypes: tuple[Literal["bfloat16"]]
    tokens_per_call: int = Field(ge=16, description="largest prefill chunk, and batch times tree size")


GpuRuntime = Literal["tensorrt-rtx", "tensorrt"]


class GpuProfile(_Profile):
    """Build settings of one kind of GPU."""

    runtime: GpuRuntime
    compute_capability: str = Field(pattern=r"^\d+\.\d$")
    memory_gib: float = Field(gt=0)
    dtypes: tuple[Literal["float16", "bfloat16"], ...] = Field(min_length=1, description="the first is the default")
    prefill_tokens: int = Field(ge=16, description="largest prefill chunk")


class CudaProfile(_Profile):
    """Build settings of any NVIDIA GPU, for PyTorch."""

    runtime: Literal["torch-cuda"]
    dtypes: tuple[Literal["bfloat16", "float16", "float32"], ...] = Field(
        min_length=1, description="the first is the default"
    )
    tokens_per_call: int = Field(ge=16, description="largest prefill chunk, and batch times tree size")


AnyProfile = CpuProfile | CudaProfile | GpuProfile
Profile = Annotated[AnyProfile, Field(discriminator="runtime")]


class _ProfileFile(StrictModel):
    profile: Profile


def profile_names() -> list[str]:
    """Names of the profiles that exist."""
    return sorted(path.stem for path in resource("build").glob("*.toml"))


def load_profile(name: str, runtime: str | None = None) -> AnyProfile:
    """Read `build/<name>.toml`; `runtime` replaces that of a GPU.

    Raises:
        PrismError: there is no such profile or runtime, or the file is invalid.
    """
    if name not in profile_names():
        raise PrismError(f"there is no profile {name!r}: choose one of {', '.join(profile_names())}")
    path = resource("build") / f"{name}.toml"
    settings = parse(_ProfileFile, {"profile": tomllib.loads(path.read_text())}, str(path)).profile
    if runtime is None:
        return settings
    if not isinstance(settings, GpuProfile):
        raise PrismError(f"profile {name} has one runtime only: leave out --runtime")
    if runtime not in (known := get_args(GpuRuntime)):
        raise PrismError(f"there is no runtime {runtime!r}: choose one of {', '.join(known)}")
    return settings.model_copy(update={"runtime": runtime})
