"""Evaluate an emitted network layer by layer in PyTorch, without a GPU and without TensorRT's kernels.

Every layer computes in float32 and rounds its result to the type that the network declares, so that differences to a
PyTorch model of the same type are those of rounding. Equal entries of a top-k keep the order of their indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prism_trt.config import TreeShape
from prism_trt.convert.drafter import emit_round, emit_step
from prism_trt.convert.graph import DTYPES, Emitted, PluginLayer, data_type
from prism_trt.convert.plugins import POOL_ATTENTION, STEP_LINEAR, Plugins
from prism_trt.convert.target import emit_target
from prism_trt.drafter.model import Drafter
from prism_trt.engines.tensorrt.binding import NetworkLimits
from prism_trt.engines.tensorrt.engine import FusedNetworkEngine, NetworkEngine
from prism_trt.errors import PrismError
from prism_trt.quantize.scales import UNQUANTIZED, Scales, to_quantized
from prism_trt.target.loading import Target

Operation = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Walker:
    """An `Executable` that walks an emitted network on the CPU."""

    def __init__(self, emitted: Emitted) -> None:
        """Read the network once.

        Raises:
            PrismError: it has a layer that emission never adds.
        """
        self._emitted = emitted  # TensorRT's objects live as long as their builder
        trt, network = emitted.trt, emitted.network
        dtypes = {data_type(trt, dtype): dtype for dtype in DTYPES}
        self._constants: dict[str, Tensor] = {}
        self._plan: list[tuple[Operation, list[str], list[tuple[str, torch.dtype]]]] = []
        for number in range(network.num_layers):
            for plugin in emitted.plugins:
                if plugin.after == number:
                    output = (plugin.output.name, dtypes[plugin.output.dtype])
                    names = [value.name for value in plugin.inputs.values()]
                    self._plan.append((_plugin(plugin), names, [output]))
            layer = network.get_layer(number)
            outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
            if layer.type == trt.LayerType.CONSTANT:
                # bfloat16 contents cannot be read back from the network.
                self._constants[outputs[0].name] = _wide(emitted.constants[layer.name])
                continue
            inputs = [value.name for i in range(layer.num_inputs) if (value := layer.get_input(i)) is not None]
            typed = [(value.name, dtypes[value.dtype]) for value in outputs]
            self._plan.append((_operation(trt, layer), inputs, typed))
        gaps = {layer.output.name for layer in emitted.plugins}
        self._inputs = {
            value.name: (dtypes[value.dtype], tuple(value.shape))
            for value in map(network.get_input, range(network.num_inputs))
            if value.name not in gaps
        }
        self._outputs = {
            value.name: dtypes[value.dtype] for value in map(network.get_output, range(network.num_outputs))
        }

    @torch.inference_mode()
    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `prism_trt.engines.tensorrt.engine.Executable.run`.

        Raises:
            ValueError: an input is missing or unknown, or has another type or shape than the network declares.
        """
        self._check(inputs)
        values = {**self._constants, **inputs}
        for operation, names, outputs in self._plan:
            results = operation([values[name] for name in names])
            for (name, dtype), result in zip(outputs, results, strict=True):
                values[name] = result if result.dtype == dtype else result.to(dtype)
        return {name: values[name] for name in self._outputs}

    def _check(self, inputs: dict[str, Tensor]) -> None:
        if inputs.keys() != self._inputs.keys():
            raise ValueError(f"the network has the inputs {sorted(self._inputs)}, not {sorted(inputs)}")
        for name, (dtype, shape) in self._inputs.items():
            value = inputs[name]
            fits = len(shape) == value.dim() and all(
                wanted in (-1, size) for wanted, size in zip(shape, value.shape, strict=True)
            )
            if value.dtype != dtype or not fits:
                raise ValueError(f"{name} is {value.dtype} {list(value.shape)}, not {dtype} {list(shape)}")


def make_walker_engine(
    trt: Any,
    target: Target,
    drafter: Drafter | None,
    limits: NetworkLimits,
    dtype: torch.dtype,
    shape: TreeShape | None = None,
    scales: Scales = UNQUANTIZED,
    plugins: Plugins | None = None,
) -> NetworkEngine:
    """An engine whose networks are emitted and walked: the reference for engines that run plans.

    Args:
        trt: a module with the network API of TensorRT 11.
        target: the model to reproduce.
        drafter: its drafter; None decodes plainly.
        limits: of the engine.
        dtype: the networks' type.
        shape: the tree of the round network; None drafts step by step.
        scales: of the matrices to quantise.
        plugins: of the step network; None is its form without plugins.
    """
    cpu = torch.device("cpu")
    capacity = limits.capacity
    walked = Walker(emit_target(trt, target.model, drafter, capacity, dtype, scales))
    if drafter is None:
        return NetworkEngine(target.config, None, None, limits, walked, None, cpu, dtype)
    of_drafter = (target.config, drafter.config, drafter.draft_vocab, limits, walked)
    step = Walker(emit_step(trt, drafter, target.model, capacity, dtype, scales, plugins))
    with_plugins = plugins is not None
    if shape is None:
        return NetworkEngine(*of_drafter, step, cpu, dtype, with_plugins)
    draft_round = Walker(emit_round(trt, drafter, target.model, shape, capacity, dtype, scales))
    return FusedNetworkEngine(*of_drafter, step, draft_round, shape, cpu, dtype, with_plugins)


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _operation(trt: Any, layer: Any) -> Operation:
    kind = layer.type
    if kind not in (known := _known(trt)):
        raise PrismError(f"the walker does not know layers of type {kind}, such as {layer.name}")
    layer_class, make = known[kind]
    layer.__class__ = layer_class  # the bindings return the base class, which hides the layer's own attributes
    return make(trt, layer)


def _plugin(layer: PluginLayer) -> Operation:
    functions: dict[str, Callable[..., Tensor]] = {STEP_LINEAR: _step_linear, POOL_ATTENTION: _pool_attention}
    function = functions[layer.plugin]
    names = tuple(layer.inputs)
    return lambda x: [function(**dict(zip(names, x, strict=True)))]


def _known(trt: Any) -> dict[Any, tuple[Any, Callable[[Any, Any], Operation]]]:
    kinds = trt.LayerType
    return {
        kinds.ELEMENTWISE: (trt.IElementWiseLayer, _elementwise),
        kinds.UNARY: (trt.IUnaryLayer, _unary),
        kinds.ACTIVATION: (trt.IActivationLayer, lambda trt, layer: lambda x: [x[0].float().sigmoid()]),
        kinds.REDUCE: (trt.IReduceLayer, _reduce),
        kinds.CAST: (trt.ICastLayer, lambda trt, layer: lambda x: [x[0]]),
        kinds.QUANTIZE: (trt.IQuantizeLayer, _quantize),
        kinds.DEQUANTIZE: (trt.IDequantizeLayer, _dequantize),
        kinds.IDENTITY: (trt.IIdentityLayer, lambda trt, layer: lambda x: [x[0]]),
        kinds.MATRIX_MULTIPLY: (trt.IMatrixMultiplyLayer, _matmul),
        kinds.SHUFFLE: (trt.IShuffleLayer, _shuffle),
        kinds.GATHER: (trt.IGatherLayer, _gather),
        kinds.CONCATENATION: (trt.IConcatenationLayer, _concat),
        kinds.TOPK: (trt.ITopKLayer, _topk),
        kinds.SHAPE: (trt.IShapeLayer, lambda trt, layer: lambda x: [torch.tensor(x[0].shape)]),
        kinds.SLICE: (trt.ISliceLayer, _slice),
        kinds.ROTARY_EMBEDDING: (trt.IRotaryEmbeddingLayer, _rotate),
        kinds.KV_CACHE_UPDATE: (trt.IKVCacheUpdateLayer, _update_cache),
        kinds.ATTENTION_INPUT: (trt.IAttentionInputLayer, lambda trt, layer: _attention),
        kinds.ATTENTION_OUTPUT: (trt.IAttentionOutputLayer, lambda trt, layer: lambda x: [x[0]]),
    }


def _elementwise(trt: Any, layer: Any) -> Operation:
    kinds = trt.ElementWiseOperation
    functions: dict[Any, Callable[..., Tensor]] = {
        kinds.SUM: torch.add,
        kinds.PROD: torch.mul,
        kinds.SUB: torch.sub,
        kinds.MIN: torch.minimum,
        kinds.MAX: torch.maximum,
        kinds.FLOOR_DIV: torch.floor_divide,
        kinds.GREATER: torch.gt,
        kinds.LESS: torch.lt,
        kinds.EQUAL: torch.eq,
        kinds.AND: torch.logical_and,
        kinds.OR: torch.logical_or,
    }
    function = functions[layer.op]
    return lambda x: [function(_wide(x[0]), _wide(x[1]))]


def _unary(trt: Any, layer: Any) -> Operation:
    kinds = trt.UnaryOperation
    functions: dict[Any, Callable[..., Tensor]] = {
        kinds.SQRT: torch.sqrt,
        kinds.RECIP: torch.reciprocal,
        kinds.EXP: torch.exp,
        kinds.LOG: torch.log,
        kinds.NEG: torch.neg,
    }
    function = functions[layer.op]
    return lambda x: [function(_wide(x[0]))]


def _reduce(trt: Any, layer: Any) -> Operation:
    kinds = trt.ReduceOperation
    functions: dict[Any, Callable[..., Tensor]] = {kinds.AVG: torch.mean, kinds.SUM: torch.sum}
    function = functions[layer.op]
    axis = layer.axes.bit_length() - 1
    return lambda x: [function(_wide(x[0]), dim=axis, keepdim=True)]


def _quantize(trt: Any, layer: Any) -> Operation:
    dtype = next(dtype for dtype in DTYPES if data_type(trt, dtype) == layer.to_type)
    return lambda x: [to_quantized(x[0], x[1], dtype)]


def _dequantize(trt: Any, layer: Any) -> Operation:
    axis = layer.axis

    def dequantize(x: Sequence[Tensor]) -> Sequence[Tensor]:
        value, scale = x
        if scale.dim():
            scale = scale.reshape([-1 if i == axis else 1 for i in range(value.dim())])
        return [value.float() * scale]

    return dequantize


def _matmul(trt: Any, layer: Any) -> Operation:
    assert layer.op0 == trt.MatrixOperation.NONE and layer.op1 == trt.MatrixOperation.TRANSPOSE

    def multiply(x: Sequence[Tensor]) -> Sequence[Tensor]:
        a, b = _wide(x[0]), _wide(x[1])
        return [torch.nn.functional.linear(a, b[0]) if len(b) == 1 else a @ b.mT]

    return multiply


def _shuffle(trt: Any, layer: Any) -> Operation:
    rank, reshaped = len(layer.get_input(0).shape), tuple(layer.reshape_dims)
    first = tuple(layer.first_transpose)[:rank]
    second = tuple(layer.second_transpose)[: len(reshaped)]

    def shuffle(x: Sequence[Tensor]) -> Sequence[Tensor]:
        value = x[0].permute(first)
        sizes = [value.shape[i] if size == 0 else size for i, size in enumerate(reshaped)]
        return [value.reshape(sizes).permute(second)]

    return shuffle


def _gather(trt: Any, layer: Any) -> Operation:
    axis, batched = layer.axis, layer.num_elementwise_dims

    def gather(x: Sequence[Tensor]) -> Sequence[Tensor]:
        values, index = x[0], x[1].long()
        if batched == 0:
            return [values[(slice(None),) * axis + (index,)]]
        assert batched == 1 and axis == 1
        return [values[torch.arange(len(index))[:, None], index]]

    return gather


def _concat(trt: Any, layer: Any) -> Operation:
    axis = layer.axis
    return lambda x: [torch.cat(list(x), dim=axis)]


def _topk(trt: Any, layer: Any) -> Operation:
    assert layer.op == trt.TopKOperation.MAX
    count = layer.k

    def topk(x: Sequence[Tensor]) -> Sequence[Tensor]:
        if count == 1:
            values, indices = x[0].max(dim=-1, keepdim=True)
            return [values, (x[0] == values).to(torch.uint8).argmax(dim=-1, keepdim=True)]
        values, indices = x[0].sort(dim=-1, descending=True, stable=True)
        return [values[..., :count], indices[..., :count]]

    return topk


def _slice(trt: Any, layer: Any) -> Operation:
    first, strides = tuple(layer.start), tuple(layer.stride)

    def cut(x: Sequence[Tensor]) -> Sequence[Tensor]:
        sizes = tuple(layer.shape) if len(x) == 1 else tuple(x[1].tolist())
        # A stride of 0 repeats one entry.
        lengths = (size if stride else 1 for size, stride in zip(sizes, strides, strict=True))
        parts = tuple(slice(at, at + length) for at, length in zip(first, lengths, strict=True))
        return [x[0][parts].expand(sizes)]

    return cut


def _rotate(trt: Any, layer: Any) -> Operation:
    assert not layer.interleaved

    def rotate(x: Sequence[Tensor]) -> Sequence[Tensor]:
        value, cosines, sines, positions = x
        a, b = _wide(value).chunk(2, dim=-1)
        cosine, sine = (_wide(table)[positions.long()].unsqueeze(1) for table in (cosines, sines))
        return [torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)]

    return rotate


def _update_cache(trt: Any, layer: Any) -> Operation:
    def update(x: Sequence[Tensor]) -> Sequence[Tensor]:
        cache, new, index = x
        for row, at in enumerate(index.tolist()):
            cache[row, :, at : at + new.shape[2]] = new[row]
        return [cache]

    return update


def _attention(x: Sequence[Tensor]) -> Sequence[Tensor]:
    queries, keys, values, mask = map(_wide, x)
    attended = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=1.0, enable_gqa=True
    )
    return [attended]


def _step_linear(
    x: Tensor, weights: Tensor, module_of_token: Tensor, scales: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """See `plugins.step_linear`: every module over all tokens, of which each keeps what its own gives."""
    modules = module_of_token.long().clamp(0, len(weights) - 1)
    y = x.new_empty(*modules.shape, weights.shape[1], dtype=torch.float32)
    for module in modules.unique().tolist():
        own = _wide(x) @ _wide(weights[module]).T
        own = own if scales is None else own * scales[module]
        y[modules == module] = (own if bias is None else own + _wide(bias[module]))[modules == module]
    return y


def _pool_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    lengths: Tensor,
    mask: Tensor,
) -> Tensor:
    """See `plugins.pool_attention`, row by row."""
    y = torch.empty(q.shape)
    tokens, width = mask.shape[1:]
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        live = length + width
        for pool, new in ((k_pool, k), (v_pool, v)):
            pool[slot, :, live - tokens : live] = new[row].transpose(0, 1)
        readable = torch.cat((mask.new_ones(tokens, length), mask[row]), dim=1)
        keys, values = _wide(k_pool[slot, :, :live]), _wide(v_pool[slot, :, :live])
        attended = torch.nn.functional.scaled_dot_product_attention(
            _wide(q[row]).transpose(0, 1), keys, values, attn_mask=readable, enable_gqa=True
        )
        y[row] = attended.transpose(0, 1)
    return y
