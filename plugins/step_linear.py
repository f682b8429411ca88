"""The linear layer of a draft step: ``y[t] = scales[m] * (weights[m] @ x[t]) + bias[m]``, ``m = module_of_token[t]``.

Shape legend: T tokens, M modules, O output features, I input features.

The weights of all modules stay stacked where they are. A thread block owns one tile of output features of one module:
it reads the module indices of its tokens, stops if none is its module, and otherwise streams its weights once for up
to `Tactic.tokens` tokens. So tokens of several modules share a launch, a module that no token uses is not read, and
the host never needs to know which module runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_trt.errors import PrismError

from .compilation import CompiledKernel, compile_kernel

FP8_CAPABILITY = 89
"""The first GPUs that convert FP8 (e4m3) in hardware; Triton refuses it below."""


@dataclass(frozen=True)
class Tactic:
    """Tile sizes of one variant of the kernel."""

    tokens: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


# TensorRT times the variants whose `tokens` fit and keeps the fastest. Narrow output tiles give small matrices enough
# thread blocks to fill the GPU, wide ones read the inputs less often. The numbers identify tactics in engines.
TACTICS = {
    1: Tactic(16, 16, 256, 4, 4),
    2: Tactic(16, 32, 128, 4, 4),
    3: Tactic(16, 32, 256, 4, 3),
    4: Tactic(16, 64, 128, 4, 3),
    5: Tactic(32, 16, 128, 4, 4),
    6: Tactic(32, 32, 128, 4, 4),
    7: Tactic(32, 64, 64, 4, 4),
    8: Tactic(64, 32, 64, 4, 4),
    9: Tactic(64, 64, 64, 4, 3),
    10: Tactic(64, 128, 64, 4, 2),
}


def tactics_for(max_tokens: int) -> list[int]:
    """Tactics for calls of up to `max_tokens`: one tile holds all tokens, or 64 of them where there are more."""
    sizes = sorted({tactic.tokens for tactic in TACTICS.values()})
    size = next((size for size in sizes if size >= max_tokens), sizes[-1])
    return [number for number, tactic in TACTICS.items() if tactic.tokens == size]


@triton.jit
def step_linear_kernel(
    x,
    weights,
    scales,
    bias,
    module_of_token,
    num_tokens,
    y,
    NUM_MODULES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Grid: token tiles, output tiles, modules. Token tiles are neighbours, so that they share weights in L2."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    module = tl.program_id(2)
    present = tokens < num_tokens
    wanted = tl.load(module_of_token + tokens, mask=present, other=0)
    wanted = tl.minimum(tl.maximum(wanted, 0), NUM_MODULES - 1)
    mine = present & (wanted == module)
    if tl.max(mine.to(tl.int32), axis=0) > 0:
        outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        inputs = tl.arange(0, INPUTS)
        # Rows past the end read the last one again: cheaper than a mask, and never stored.
        rows = tl.minimum(outputs, OUT_FEATURES - 1)
        module_weights = weights + module.to(tl.int64) * OUT_FEATURES * IN_FEATURES
        weight_tile = module_weights + rows[:, None] * IN_FEATURES + inputs[None, :]
        x_tile = x + tokens[:, None] * IN_FEATURES + inputs[None, :]
        total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
        for start in range(0, IN_FEATURES, INPUTS):
            if IN_FEATURES % INPUTS == 0:
                a = tl.load(x_tile + start, mask=mine[:, None], other=0.0, eviction_policy="evict_last")
                w = tl.load(weight_tile + start, eviction_policy="evict_first")
            else:
                inside = (start + inputs < IN_FEATURES)[None, :]
                a = tl.load(x_tile + start, mask=mine[:, None] & inside, other=0.0, eviction_policy="evict_last")
                w = tl.load(weight_tile + start, mask=inside, other=0.0, eviction_policy="evict_first")
            total = tl.dot(a, tl.trans(w.to(a.dtype)), total)
        if HAS_SCALES:
            total *= tl.load(scales + module)
        if HAS_BIAS:
            total += tl.load(bias + module * OUT_FEATURES + rows).to(tl.float32)[None, :]
        stored = mine[:, None] & (outputs < OUT_FEATURES)[None, :]
        y_tile = y + tokens[:, None] * OUT_FEATURES + outputs[None, :]
        tl.store(y_tile, total.to(y.dtype.element_ty), mask=stored)


def check_weight_type(is_fp8: bool, compute_capability: int) -> None:
    """Refuse FP8 weights for GPUs without FP8.

    Raises:
        PrismError: as said.
    """
    if is_fp8 and compute_capability < FP8_CAPABILITY:
        raise PrismError(
            f"FP8 weights need a GPU of compute capability 8.9 or newer and this build is for "
            f"{compute_capability / 10:.1f}: build with fp16 or bf16 weights"
        )


def constants(
    num_modules: int, out_features: int, in_features: int, has_scales: bool, has_bias: bool, tactic: Tactic
) -> dict[str, int | bool]:
    """Compile-time arguments of `step_linear_kernel`."""
    return {
        "NUM_MODULES": num_modules,
        "OUT_FEATURES": out_features,
        "IN_FEATURES": in_features,
        "HAS_SCALES": has_scales,
        "HAS_BIAS": has_bias,
        "TOKENS": tactic.tokens,
        "OUTPUTS": tactic.outputs,
        "INPUTS": tactic.inputs,
    }


def compile_step_linear(
    x_type: str,
    weight_type: str,
    shape: tuple[int, int, int],
    has_scales: bool,
    has_bias: bool,
    tactic: Tactic,
    compute_capability: int,
    kernels: Path,
) -> CompiledKernel:
    """Compile for weights of `shape` [M, O, I]; types are Triton's: ``fp16``, ``bf16``, and ``fp8e4nv`` for weights.

    `kernels` as for `compile_kernel`.

    Raises:
        PrismError: FP8 weights on a GPU without FP8.
    """
    check_weight_type(weight_type == "fp8e4nv", compute_capability)
    return compile_kernel(
        step_linear_kernel,
        {
            "x": f"*{x_type}",
            "weights": f"*{weight_type}",
            "scales": "*fp32",
            "bias": f"*{x_type}",
            "module_of_token": "*i32",
            "num_tokens": "i32",
            "y": f"*{x_type}",
        },
        constants(*shape, has_scales, has_bias, tactic),
        compute_capability,
        tactic.num_warps,
        tactic.num_stages,
        kernels,
    )


def grid(num_tokens: int, num_modules: int, out_features: int, tactic: Tactic) -> tuple[int, int, int]:
    """Thread blocks of one launch."""
    return triton.cdiv(num_tokens, tactic.tokens), triton.cdiv(out_features, tactic.outputs), num_modules


def step_linear(
    x: Tensor,
    weights: Tensor,
    module_of_token: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    tactic: Tactic | None = None,
) -> Tensor:
    """Launch the kernel on contiguous torch tensors.

    Args:
        x: [T, I] float16 or bfloat16.
        weights: [M, O, I] of the type of `x`, or float8_e4m3fn.
        module_of_token: [T] int32; an index outside 0..M-1 counts as the nearest one inside.
        scales: [M] float32, one per module; what an FP8 weight must be multiplied by.
        bias: [M, O] of the type of `x`.
        tactic: tile sizes; by default the first of `tactics_for`.

    Returns:
        [T, O] of the type of `x`, accumulated in float32.
    """
    if tactic is None:
        tactic = TACTICS[tactics_for(x.shape[0])[0]]
    y = torch.empty(x.shape[0], weights.shape[1], dtype=x.dtype, device=x.device)
    num_modules, out_features, in_features = weights.shape
    step_linear_kernel[grid(x.shape[0], num_modules, out_features, tactic)](
        x,
        weights,
        x if scales is None else scales,
        x if bias is None else bias,
        module_of_token,
        x.shape[0],
        y,
        **constants(num_modules, out_features, in_features, scales is not None, bias is not None, tactic),
        num_warps=tactic.num_warps,
        num_stages=tactic.num_stages,
    )
    return y
