"""The plugins as TensorRT quick-deployable plugins (``tensorrt.plugin``), and how to add them to a network.

Importing this module registers both plugins in TensorRT's plugin registry, as `tensorrt.plugin.register` does. Their
implementations are ahead of time only: the engine holds PTX and needs neither Python nor a library to run.
"""

# `tensorrt.plugin` reads the annotations as objects: no `from __future__ import annotations` here.
import math
from pathlib import Path
from typing import Any

import numpy.typing  # noqa: F401  `tensorrt.plugin` uses it without importing it
import tensorrt as trt
import tensorrt.plugin as trtp

from prism_trt.errors import PrismError

from . import pool_attention as pool
from . import step_linear as linear
from .compilation import CompiledKernel, kernel_cache

_TRITON_TYPES = {trt.float16: "fp16", trt.bfloat16: "bf16", trt.fp8: "fp8e4nv"}


@trtp.register("prism::step_linear")
def _describe_step_linear(
    x: trtp.TensorDesc,
    weights: trtp.TensorDesc,
    scales: trtp.TensorDesc,
    bias: trtp.TensorDesc,
    module_of_token: trtp.TensorDesc,
    compute_capability: int,
    has_scales: bool,
    has_bias: bool,
    kernels: str,
) -> trtp.TensorDesc:
    return trtp.from_shape_expr((*list(x.shape_expr)[:-1], weights.shape_expr[1]), x.dtype)


@trtp.autotune("prism::step_linear")
def _tune_step_linear(
    x: trtp.TensorDesc,
    weights: trtp.TensorDesc,
    scales: trtp.TensorDesc,
    bias: trtp.TensorDesc,
    module_of_token: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    tensors = (x, weights, scales, bias, module_of_token, *outputs)
    return [_combination(tensors, linear.tactics_for(math.prod(_largest(x, axis) for axis in range(len(x.shape) - 1))))]


@trtp.aot_impl("prism::step_linear")
def _compile_step_linear(
    x: trtp.TensorDesc,
    weights: trtp.TensorDesc,
    scales: trtp.TensorDesc,
    bias: trtp.TensorDesc,
    module_of_token: trtp.TensorDesc,
    compute_capability: int,
    has_scales: bool,
    has_bias: bool,
    kernels: str,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:
    num_modules, out_features, in_features = weights.shape
    tiles = linear.TACTICS[tactic]
    kernel = linear.compile_step_linear(
        _TRITON_TYPES[x.dtype],
        _TRITON_TYPES[weights.dtype],
        (num_modules, out_features, in_features),
        has_scales,
        has_bias,
        tiles,
        compute_capability,
        Path(kernels),
    )
    num_tokens = math.prod(list(x.shape_expr)[1:-1], start=x.shape_expr[0])
    grid = (trtp.cdiv(num_tokens, tiles.tokens), -(-out_features // tiles.outputs), num_modules)
    return _launch(kernel, grid, num_tokens)


@trtp.register("prism::pool_attention")
def _describe_pool_attention(
    q: trtp.TensorDesc,
    k: trtp.TensorDesc,
    v: trtp.TensorDesc,
    k_pool: trtp.TensorDesc,
    v_pool: trtp.TensorDesc,
    slots: trtp.TensorDesc,
    lengths: trtp.TensorDesc,
    mask: trtp.TensorDesc,
    compute_capability: int,
    kernels: str,
) -> tuple[trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc]:
    return q.like(), k_pool.aliased(), v_pool.aliased()


@trtp.autotune("prism::pool_attention")
def _tune_pool_attention(
    q: trtp.TensorDesc,
    k: trtp.TensorDesc,
    v: trtp.TensorDesc,
    k_pool: trtp.TensorDesc,
    v_pool: trtp.TensorDesc,
    slots: trtp.TensorDesc,
    lengths: trtp.TensorDesc,
    mask: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    tensors = (q, k, v, k_pool, v_pool, slots, lengths, mask, *outputs)
    group = q.shape[2] // k.shape[2]
    return [_combination(tensors, pool.tactics_for(_largest(q, 1) * group))]


@trtp.aot_impl("prism::pool_attention")
def _compile_pool_attention(
    q: trtp.TensorDesc,
    k: trtp.TensorDesc,
    v: trtp.TensorDesc,
    k_pool: trtp.TensorDesc,
    v_pool: trtp.TensorDesc,
    slots: trtp.TensorDesc,
    lengths: trtp.TensorDesc,
    mask: trtp.TensorDesc,
    compute_capability: int,
    kernels: str,
    outputs: tuple[trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc],
    tactic: int,
) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:
    heads = q.shape[2]
    _, kv_heads, capacity, head_dim = k_pool.shape
    tiles = pool.TACTICS[tactic]
    kernel = pool.compile_pool_attention(
        _TRITON_TYPES[q.dtype], heads, kv_heads, head_dim, capacity, tiles, compute_capability, Path(kernels)
    )
    batch, num_tokens = q.shape_expr[0], q.shape_expr[1]
    grid = (trtp.cdiv(num_tokens * (heads // kv_heads), tiles.rows), kv_heads, batch)
    return _launch(kernel, grid, num_tokens, mask.shape_expr[2])


def _combination(tensors: tuple[trtp.TensorDesc, ...], tactics: list[int]) -> trtp.AutoTuneCombination:
    """Exactly the types of the network, which is strongly typed, in row-major layout."""
    return trtp.AutoTuneCombination(", ".join(tensor.dtype.name for tensor in tensors), "LINEAR", tactics)


def _largest(tensor: trtp.TensorDesc, axis: int) -> int:
    shape = tensor.shape
    return shape.max[axis] if shape[axis] == -1 else shape[axis]


def _launch(
    kernel: CompiledKernel, grid: tuple[Any, Any, Any], *extras: Any
) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
    """What `aot_impl` returns; `extras` are the kernel's int32 arguments between its inputs and its outputs."""
    launch = trtp.KernelLaunchParams(*grid, block_x=kernel.threads, shared_mem=kernel.shared_bytes)
    return kernel.name, kernel.ptx, launch, trtp.SymIntExprs.from_tuple(extras)


def add_step_linear(
    network: trt.INetworkDefinition,
    x: trt.ITensor,
    weights: trt.ITensor,
    module_of_token: trt.ITensor,
    compute_capability: int,
    scales: trt.ITensor | None = None,
    bias: trt.ITensor | None = None,
    kernels: Path | None = None,
    name: str | None = None,
) -> trt.ITensor:
    """Add ``prism::step_linear``; arguments and result as in `step_linear.step_linear`, as network tensors.

    `weights` is best the output of a constant layer, or a network input: either is read in place. Tokens may have
    several axes: `x` [B, T, I] and `module_of_token` [B, T] give [B, T, O]. `kernels` is the directory of
    compiled kernels (`compilation.compile_kernel`), the user's own when None, and `name` the layer's.

    Raises:
        PrismError: FP8 weights for a GPU without FP8, or TensorRT refuses the layer.
    """
    linear.check_weight_type(weights.dtype == trt.fp8, compute_capability)
    # A plugin has a fixed number of inputs: x stands in for those that are absent, and the kernel does not read them.
    plugin = trtp.op.prism.step_linear(
        x,
        weights,
        x if scales is None else scales,
        x if bias is None else bias,
        module_of_token,
        compute_capability=compute_capability,
        has_scales=scales is not None,
        has_bias=bias is not None,
        kernels=str(kernels or kernel_cache()),
    )
    return _layer(network, plugin, name).get_output(0)


def add_pool_attention(
    network: trt.INetworkDefinition,
    q: trt.ITensor,
    k: trt.ITensor,
    v: trt.ITensor,
    k_pool: trt.ITensor,
    v_pool: trt.ITensor,
    slots: trt.ITensor,
    lengths: trt.ITensor,
    mask: trt.ITensor,
    compute_capability: int,
    kernels: Path | None = None,
    name: str | None = None,
) -> tuple[trt.ITensor, trt.ITensor, trt.ITensor]:
    """Add ``prism::pool_attention``; arguments as in `pool_attention.pool_attention`, as network tensors.

    `kernels` and `name` as for `add_step_linear`.

    The pools must be network inputs. The attention output and the two updated pools are returned; mark the pools as
    network outputs and bind each to the address of its input. The builder configuration needs the preview feature
    ``ALIASED_PLUGIN_IO_10_03``.

    Raises:
        PrismError: TensorRT refuses the layer.
    """
    plugin = trtp.op.prism.pool_attention(
        q,
        k,
        v,
        k_pool,
        v_pool,
        slots,
        lengths,
        mask,
        compute_capability=compute_capability,
        kernels=str(kernels or kernel_cache()),
    )
    layer = _layer(network, plugin, name)
    return layer.get_output(0), layer.get_output(1), layer.get_output(2)


def _layer(network: trt.INetworkDefinition, plugin: Any, name: str | None) -> Any:
    layer = network.add_plugin(plugin, aot=True)
    if layer is None:
        raise PrismError(f"TensorRT refused the plugin layer {name or ''}: its log above says why")
    if name is not None:
        layer.name = name
    return layer
