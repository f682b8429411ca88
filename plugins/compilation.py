"""Compile Triton kernels to PTX for a GPU that need not be there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PTX_VERSION = 84
"""PTX 8.4 (CUDA 12.4): Triton's own default is newer than what many installed drivers load."""

MAX_SHARED_BYTES = 48 * 1024
"""What any kernel may use without asking the driver for more, which nothing says TensorRT does for plugins."""


@dataclass(frozen=True)
class CompiledKernel:
    """What a launch needs."""

    name: str
    ptx: str
    cubin: bytes
    threads: int
    shared_bytes: int


def compile_kernel(
    kernel: triton.JITFunction,
    signature: dict[str, str],
    constants: dict[str, Any],
    compute_capability: int,
    num_warps: int,
    num_stages: int,
) -> CompiledKernel:
    """Compile `kernel` for a GPU of `compute_capability` (80, 89, 90).

    `signature` gives the Triton type of every argument that is passed at launch, in order (``*fp16``, ``i32``, ...);
    `constants` the value of every other. Pointers are taken to be aligned to 16 bytes; TensorRT aligns tensors to 256.

    Raises:
        RuntimeError: the kernel needs scratch memory, or more shared memory than `MAX_SHARED_BYTES`; a plugin gets
            neither.
    """
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
        raise RuntimeError(f"{metadata.name} needs {metadata.shared} bytes of shared memory, above {MAX_SHARED_BYTES}")
    return CompiledKernel(
        metadata.name, compiled.asm["ptx"], compiled.asm["cubin"], metadata.num_warps * 32, metadata.shared
    )
