"""A thin layer over `INetworkDefinition`: named layers, weights that stay alive, and errors that raise.

Works with every module that has the network API of TensorRT 11 (``tensorrt``, ``tensorrt_rtx``,
``tensorrt_rtx_bindings``); the module is always a parameter. Tensors of a network are called values here, because in
this project a tensor is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from prism_trt.convert.scratch import Place, as_it_is
from prism_trt.errors import PrismError

Value = Any
"""An `ITensor`."""

_QUANTIZED = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool, *_QUANTIZED)
"""The types of values."""

_LAYER_DUMP = "Layers:"
# Logged whenever a builder exists on a machine without a GPU; ahead-of-time builds do not need one.
_NO_DRIVER = "cudaError 35"


class BuildLog:
    """What TensorRT reported: it logs errors instead of raising, and swallows what a logger raises."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.layer_dump: str | None = None

    def record(self, is_error: bool, message: str) -> None:
        """Keep errors, and the layer dump that a build with detailed verbosity logs."""
        if message.startswith(_LAYER_DUMP):
            self.layer_dump = message
        elif is_error and _NO_DRIVER not in message:
            self.errors.append(message)

    def start(self) -> None:
        """Forget everything."""
        self.errors.clear()
        self.layer_dump = None

    def check(self, action: str) -> None:
        """Raise what was logged since the last check.

        Raises:
            PrismError: TensorRT logged an error while doing `action`.
        """
        if self.errors:
            message = self.errors[0]
            self.errors.clear()
            raise PrismError(f"TensorRT refused {action}: {message}")


@cache
def logger_of(trt: Any) -> tuple[Any, BuildLog]:
    """The logger of the module `trt` and its log; one per process, because TensorRT ignores any later logger."""
    log = BuildLog()

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.record(severity <= trt.ILogger.Severity.ERROR, message)

    return Logger(), log


def data_type(trt: Any, dtype: torch.dtype) -> Any:
    """The `DataType` of `trt` that corresponds to one of `DTYPES`."""
    return getattr(trt, _QUANTIZED.get(dtype, str(dtype).removeprefix("torch.")))


def has_plugins(trt: Any) -> bool:
    """Whether networks of the module `trt` can have plugin layers: those of TensorRT-RTX cannot."""
    return hasattr(trt.INetworkDefinition, "add_plugin")


@dataclass(frozen=True)
class PluginLayer:
    """A layer that a plugin computes."""

    name: str
    plugin: str
    """Its name, without the namespace."""
    inputs: Mapping[str, Value]
    output: Value
    after: int
    """Layers of the network that were added before it."""


@dataclass(frozen=True)
class Emitted:
    """A complete network and what must live as long as it."""

    trt: Any
    builder: Any
    network: Any
    constants: dict[str, Tensor]
    """Contents of the constant layers by layer name; the network points into their memory."""
    plugins: tuple[PluginLayer, ...] = ()
    """In the order in which they run."""


class Graph:
    """A strongly typed network under construction, computing in `dtype`; its constants live at `place`."""

    def __init__(self, trt: Any, dtype: torch.dtype, place: Place = as_it_is) -> None:
        self.trt = trt
        self.dtype = dtype
        self._place = place
        logger, self._log = logger_of(trt)
        self._log.start()
        self._builder = trt.Builder(logger)
        self._network = self._builder.create_network(0)
        self._scope: list[str] = []
        self._uses: dict[str, int] = {}
        self._constants: dict[str, Tensor] = {}
        self._values: dict[str, Value] = {}
        self._sizes: dict[tuple[str, int], Value] = {}
        self._plugins: list[PluginLayer] = []

    def finish(self) -> Emitted:
        """The network."""
        return Emitted(self.trt, self._builder, self._network, self._constants, tuple(self._plugins))

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Layers added inside the block have `name` in their names."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> Value:
        """A network input; dimensions given by a name are dynamic, and equal wherever the name is."""
        static = [-1 if isinstance(size, str) else size for size in shape]
        value = self._network.add_input(name, data_type(self.trt, dtype), static)
        self._log.check(f"the input {name}")
        for axis, size in enumerate(shape):
            if isinstance(size, str):
                value.set_dimension_name(axis, size)
        return value

    def output(self, name: str, value: Value) -> None:
        """Make `value` the network output `name`."""
        value.name = name
        self._network.mark_output(value)
        self._log.check(f"the output {name}")

    # -- constants

    def weight(self, name: str, content: Tensor | Callable[[], Tensor], dtype: torch.dtype | None = None) -> Value:
        """A constant with its own, unscoped name; asked for again, it is the same value.

        Args:
            name: the layer's name.
            content: any shape, or what computes it; converted to `dtype`, the network's own when None.
        """
        if name not in self._values:
            content = content if isinstance(content, Tensor) else content()
            content = self._place(content.detach().cpu().to(dtype or self.dtype).contiguous())
            weights = self.trt.Weights(data_type(self.trt, content.dtype), content.data_ptr(), content.numel())
            layer = self._network.add_constant(tuple(content.shape), weights)
            if layer is None:
                self._log.check(name)
            layer.name = name
            self._constants[name] = content
            self._values[name] = layer.get_output(0)
        return self._values[name]

    def number(self, value: float, like: Value) -> Value:
        """A constant that broadcasts against `like` and has its type."""
        dtype = next(dtype for dtype in DTYPES if data_type(self.trt, dtype) == like.dtype)
        rank = len(like.shape)
        return self.weight(f"number/{value}/{dtype}/{rank}", torch.full((1,) * rank, value, dtype=dtype), dtype)

    # -- layers

    def add(self, a: Value, b: Value, name: str = "add") -> Value:
        """``a + b``; like all operations of two values it broadcasts and needs equal ranks and types."""
        return self.elementwise("SUM", a, b, name)

    def multiply(self, a: Value, b: Value, name: str = "multiply") -> Value:
        """``a * b``."""
        return self.elementwise("PROD", a, b, name)

    def subtract(self, a: Value, b: Value, name: str = "subtract") -> Value:
        """``a - b``."""
        return self.elementwise("SUB", a, b, name)

    def elementwise(self, operation: str, a: Value, b: Value, name: str) -> Value:
        """Any `ElementWiseOperation`."""
        return self._layer(name, self._network.add_elementwise(a, b, getattr(self.trt.ElementWiseOperation, operation)))

    def unary(self, operation: str, a: Value, name: str) -> Value:
        """Any `UnaryOperation`."""
        return self._layer(name, self._network.add_unary(a, getattr(self.trt.UnaryOperation, operation)))

    def sigmoid(self, a: Value) -> Value:
        """The logistic function."""
        return self._layer("sigmoid", self._network.add_activation(a, self.trt.ActivationType.SIGMOID))

    def reduce(self, operation: str, a: Value, axis: int, name: str) -> Value:
        """Any `ReduceOperation` over one axis, which is kept with size 1."""
        operation = getattr(self.trt.ReduceOperation, operation)
        return self._layer(name, self._network.add_reduce(a, operation, 1 << axis, True))

    def cast(self, a: Value, dtype: torch.dtype) -> Value:
        """`a` as `dtype`; `a` itself when it has that type."""
        wanted = data_type(self.trt, dtype)
        return a if a.dtype == wanted else self._layer("cast", self._network.add_cast(a, wanted))

    def quantize(self, a: Value, scale: Value, dtype: torch.dtype, name: str) -> Value:
        """``a / scale`` rounded to `dtype`, an 8-bit one, saturating; `scale` is float32 []."""
        return self._layer(name, self._network.add_quantize(a, scale, data_type(self.trt, dtype)))

    def dequantize(self, a: Value, scale: Value, name: str, axis: int | None = None) -> Value:
        """``a * scale`` in the network's type; `scale` is float32, [] or one number for each index of `axis`."""
        layer = self._network.add_dequantize(a, scale, data_type(self.trt, self.dtype))
        if axis is not None:
            layer.axis = axis
        return self._layer(name, layer)

    def identity(self, a: Value, name: str) -> Value:
        """A copy of `a`, so that one value can be an output and an input of further layers under its own name."""
        return self._layer(name, self._network.add_identity(a))

    def matmul_transposed(self, a: Value, b: Value, name: str) -> Value:
        """``a @ b.T`` of the last two axes; the others broadcast."""
        operation = self.trt.MatrixOperation
        return self._layer(name, self._network.add_matrix_multiply(a, operation.NONE, b, operation.TRANSPOSE))

    def reshape(
        self, a: Value, shape: Sequence[int], then: Sequence[int] | None = None, name: str = "reshape"
    ) -> Value:
        """`a` in another shape (0 keeps the axis of that index, -1 is inferred), its axes then permuted by `then`."""
        layer = self._network.add_shuffle(a)
        layer.reshape_dims = tuple(shape)
        if then is not None:
            layer.second_transpose = self.trt.Permutation(list(then))
        return self._layer(name, layer)

    def transpose(self, a: Value, axes: Sequence[int], then: Sequence[int], name: str = "transpose") -> Value:
        """`a` with its axes permuted, then reshaped as by `reshape`."""
        layer = self._network.add_shuffle(a)
        layer.first_transpose = self.trt.Permutation(list(axes))
        layer.reshape_dims = tuple(then)
        return self._layer(name, layer)

    def gather(self, a: Value, indices: Value, axis: int, batch_axes: int = 0, name: str = "gather") -> Value:
        """`a` at `indices` of `axis`; the first `batch_axes` axes of both run together."""
        layer = self._network.add_gather_v2(a, indices, self.trt.GatherMode.DEFAULT)
        layer.axis = axis
        layer.num_elementwise_dims = batch_axes
        return self._layer(name, layer)

    def concat(self, values: Sequence[Value], axis: int, name: str = "concat") -> Value:
        """`values` joined along `axis`."""
        if len(values) == 1:
            return values[0]
        layer = self._network.add_concatenation(list(values))
        layer.axis = axis
        return self._layer(name, layer)

    def top(self, a: Value, count: int, name: str) -> tuple[Value, Value]:
        """The `count` greatest entries of the last axis, greatest first, and their int32 indices."""
        axes = 1 << (len(a.shape) - 1)
        layer = self._network.add_topk(a, self.trt.TopKOperation.MAX, count, axes)
        return self._layer(name, layer), layer.get_output(1)

    def rotate(self, a: Value, cosines: Value, sines: Value, positions: Value, name: str) -> Value:
        """Rotary embedding of [B, heads, T, d] by tables [P, d / 2] at positions [B, T]; halves are paired."""
        layer = self._network.add_rotary_embedding(a, cosines, sines, False, a.shape[3])
        layer.set_input(3, positions)
        return self._layer(name, layer)

    def update_cache(self, cache: Value, new: Value, index: Value, name: str) -> Value:
        """`cache` [B, g, C, d] with `new` [B, g, T, d] written from entry index[b] of row b on, in place."""
        layer = self._network.add_kv_cache_update(cache, new, index, self.trt.KVCacheMode.LINEAR)
        return self._layer(name, layer)

    def attend(self, queries: Value, keys: Value, values: Value, mask: Value, name: str) -> Value:
        """Softmax attention of [B, h, T, d] over [B, g, L, d]; `mask` [B, 1, T, L] is added to the scores."""
        softmax, uncausal = self.trt.AttentionNormalizationOp.SOFTMAX, self.trt.CausalMaskKind.NONE
        attention = self._network.add_attention_v2(queries, keys, values, softmax, uncausal)
        if attention is None:
            self._log.check(self._named(name))
        attention.mask = mask
        attention.name = self._unique(name)
        self._log.check(self._named(name))
        return attention.get_output(0)

    def plugin(
        self,
        plugin: str,
        inputs: Mapping[str, Value],
        shape: Sequence[int | str],
        add: Callable[[Any, str], Value],
        name: str,
    ) -> Value:
        """A layer that `plugin` computes; its output has the network's type and `shape`, as for `input`.

        `add` adds it to a network under a name and returns the output. Bindings without plugins leave a gap in the
        network instead: the output becomes an input, and only the walker can run the network.
        """
        full, after = self._unique(name), self._network.num_layers
        if has_plugins(self.trt):
            output = add(self._network, full)
            self._log.check(full)
        else:
            output = self.input(f"{full}.output", self.dtype, shape)
        self._plugins.append(PluginLayer(full, plugin, dict(inputs), output, after))
        return output

    # -- shapes

    def size(self, a: Value, axis: int) -> Value:
        """int64 [1]: the size of an axis at run time."""
        if (a.name, axis) not in self._sizes:
            shape = self._layer("shape", self._network.add_shape(a))
            self._sizes[a.name, axis] = self._layer("size", self._network.add_slice(shape, (axis,), (1,), (1,)))
        return self._sizes[a.name, axis]

    def sizes(self, parts: Sequence[int | Value]) -> Value:
        """int64 [n]: a shape of known sizes and of sizes from `size`."""
        values = [
            self.weight(f"size/{part}", torch.tensor([part]), torch.int64) if isinstance(part, int) else part
            for part in parts
        ]
        return self.concat(values, 0, "sizes")

    def part(self, a: Value, axis: int, start: int, length: int, name: str) -> Value:
        """Entries start..start+length-1 of one axis; the other sizes may be dynamic."""
        shape: list[int | Value] = [self.size(a, i) if n < 0 else n for i, n in enumerate(a.shape)]
        shape[axis] = length
        first = [start if i == axis else 0 for i in range(len(shape))]
        return self._slice(a, first, (1,) * len(shape), self.sizes(shape), name)

    def window(self, a: Value, shape: Value, name: str) -> Value:
        """The block of `a` that begins at its origin and has the run-time `shape`."""
        rank = len(a.shape)
        return self._slice(a, (0,) * rank, (1,) * rank, shape, name)

    def expand(self, a: Value, shape: Sequence[int | Value], name: str = "expand") -> Value:
        """`a` repeated to `shape` along its axes of size 1."""
        strides = tuple(0 if size == 1 else 1 for size in a.shape)
        return self._slice(a, (0,) * len(strides), strides, self.sizes(shape), name)

    def _slice(self, a: Value, first: Sequence[int], strides: Sequence[int], shape: Value, name: str) -> Value:
        layer = self._network.add_slice(a, tuple(first), (1,) * len(first), tuple(strides))
        layer.set_input(2, shape)
        return self._layer(name, layer)

    def _layer(self, name: str, layer: Any) -> Value:
        if layer is None:
            self._log.check(self._named(name))
        layer.name = self._unique(name)
        value = layer.get_output(0)
        try:
            rank = len(value.shape)
        except (RuntimeError, ValueError):  # what the bindings make of a shape that cannot be inferred
            rank = -1
        self._log.check(self._named(name))
        if rank < 0:
            raise PrismError(f"TensorRT cannot infer the shape of {layer.name}")
        return value

    def _named(self, name: str) -> str:
        return "/".join((*self._scope, name))

    def _unique(self, name: str) -> str:
        full = self._named(name)
        self._uses[full] = self._uses.get(full, 0) + 1
        return full if self._uses[full] == 1 else f"{full}.{self._uses[full]}"
