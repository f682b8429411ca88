"""Compile Triton kernels to PTX for a GPU that need not be there, and keep them in files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prism_trt.errors import PrismError
from prism_trt.manifest import atomic_file, sha256_json

PTX_VERSION = 84
"""PTX 8.4 (CUDA 12.4): Triton's own default is newer than what many installed drivers load."""

MAX_SHARED_BYTES = 48 * 1024
"""What any kernel may use without asking the driver for more, which nothing says TensorRT does for plugins."""

_LAUNCH = "// launch: "


@dataclass(frozen=True)
class CompiledKernel:
    """What a launch needs."""

    name: str
    ptx: str
    threads: int
    shared_bytes: int


def kernel_cache() -> Path:
    """This user's directory of compiled kernels."""
    return Path(platformdirs.user_cache_dir("prism_trt")) / "kernels"


def compile_kernel(
    kernel: triton.JITFunction,
    signature: dict[str, str],
    constants: dict[str, Any],
    compute_capability: int,
    num_warps: int,
    num_stages: int,
    kernels: Path,
) -> CompiledKernel:
    """Compile `kernel` for a GPU of `compute_capability` (80, 89, 90).

    `signature` gives the Triton type of every argument that is passed at launch, in order (``*fp16``, ``i32``, ...);
    `constants` the value of every other. Pointers are taken to be aligned to 16 bytes; TensorRT aligns tensors to 256.
    A kernel that the directory `kernels` holds, compiled from the same source for the same arguments, is read from
    there; any other is put there.

    Raises:
        RuntimeError: the kernel needs scratch memory, which a plugin does not get.
        PrismError: it needs more shared memory than `MAX_SHARED_BYTES`, a file of `kernels` is damaged, or the disk
            does not take one.
    """
    digest = sha256_json([kernel.cache_key, signature, constants, num_warps, num_stages, PTX_VERSION])[:16]
    file = kernels / f"{kernel.__name__}-sm{compute_capability}-{digest}.ptx"
    if file.is_file():
        return _read(file)
    compiled = _compile(kernel, signature, constants, compute_capability, num_warps, num_stages)
    _write(file, compiled)
    return compiled


def _compile(
    kernel: triton.JITFunction,
    signature: dict[str, str],
    constants: dict[str, Any],
    compute_capability: int,
    num_warps: int,
    num_stages: int,
) -> CompiledKernel:
    pointers = [position for position, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(
        kernel,
        {**signature, **{name: "constexpr" for name in constants}},
        constexprs=constants,
        attrs={(position,): [["tt.divisibility", 16]] for position in pointers},
    )
    # The fusion of multiplications and additions is set because its default differs between versions of Triton.
    options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "ptx_version": PTX_VERSION,
        "enable_fp_fusion": True,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", compute_capability, 32), options=options)
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise RuntimeError(f"{metadata.name} needs scratch memory, which a plugin does not get")
    if metadata.shared > MAX_SHARED_BYTES:
        raise PrismError(
            f"{metadata.name} needs {metadata.shared} bytes of shared memory for heads of this width and plugins get "
            f"{MAX_SHARED_BYTES}: build with --runtime tensorrt-rtx"
        )
    return CompiledKernel(metadata.name, compiled.asm["ptx"], metadata.num_warps * 32, metadata.shared)


def _write(file: Path, kernel: CompiledKernel) -> None:
    """PTX whose first line is a comment that says how to launch it."""
    launch = {"name": kernel.name, "threads": kernel.threads, "shared_bytes": kernel.shared_bytes}
    with atomic_file(file) as temporary:
        temporary.write_text(f"{_LAUNCH}{json.dumps(launch)}\n{kernel.ptx}")


def _read(file: Path) -> CompiledKernel:
    launch, _, ptx = file.read_text().partition("\n")
    try:
        return CompiledKernel(ptx=ptx, **json.loads(launch.removeprefix(_LAUNCH)))
    except (TypeError, ValueError):
        raise PrismError(f"{file} is damaged: build or copy the bundle again") from None
