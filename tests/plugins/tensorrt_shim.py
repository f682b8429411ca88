"""A stand-in for the part of `tensorrt` that NVIDIA's `tensorrt.plugin` package is written against.

TensorRT's bindings cannot be imported without its libraries, but the `plugin` package inside their wheel is plain
Python and decides what TensorRT is told about a plugin: it is loaded here, unchanged, on top of small Python classes
that stand where the C++ ones would be. `build` calls it in an order that its source implies. So the tests that use this
shim see what the plugins say to TensorRT; what TensorRT makes of it they cannot see.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

DataType = enum.Enum("DataType", "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4 FP4")
DimensionOperation = enum.Enum("DimensionOperation", "SUM PROD MAX MIN SUB EQUAL LESS FLOOR_DIV CEIL_DIV")
Dimension = int | tuple[int, int, int]
"""A fixed size, or the smallest, usual and largest of a dynamic one."""

_OPERATIONS: dict[Any, Callable[[int, int], int]] = {
    DimensionOperation.SUM: lambda a, b: a + b,
    DimensionOperation.SUB: lambda a, b: a - b,
    DimensionOperation.PROD: lambda a, b: a * b,
    DimensionOperation.MAX: max,
    DimensionOperation.MIN: min,
    DimensionOperation.FLOOR_DIV: lambda a, b: a // b,
    DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
}


class Expression:
    """A function of the dynamic dimensions, which are named ``<tensor>.<axis>``."""

    def __init__(self, value: Callable[[dict[str, int]], int], constant: bool) -> None:
        self.value = value
        self._constant = constant

    def is_constant(self) -> bool:
        return self._constant

    def get_constant_value(self) -> int:
        return self.value({})


class ExpressionBuilder:
    def constant(self, value: int) -> Expression:
        return Expression(lambda _: value, True)

    def operation(self, operation: Any, first: Expression, second: Expression) -> Expression:
        apply = _OPERATIONS[operation]
        constant = first.is_constant() and second.is_constant()
        return Expression(lambda sizes: apply(first.value(sizes), second.value(sizes)), constant)


class Object:
    """Base of classes that only carry attributes."""

    def __init__(self, *_: Any) -> None:
        pass


class PluginField:
    def __init__(self, name: str, data: Any, type: Any) -> None:
        self.name, self.type = name, type
        self.data = np.frombuffer(data, np.int8) if isinstance(data, bytes) else data


class PluginTensorDesc:
    dims: tuple[int, ...]
    type: Any
    format: Any
    scale = 1.0


class DynamicPluginTensorDesc:
    desc: PluginTensorDesc
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class Dims(tuple):
    MAX_DIMS = 8


class DimsExprs(list):
    def __init__(self, size: int) -> None:
        super().__init__([None] * size)


class SymExprs(list):
    """Where a plugin writes the extra kernel arguments."""

    @property
    def nbSymExprs(self) -> int:
        return len(self)

    @nbSymExprs.setter
    def nbSymExprs(self, count: int) -> None:
        self[:] = [None] * count


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[namespace, creator.name] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[namespace, name]


@dataclass
class ITensor:
    """A network tensor."""

    name: str
    dtype: Any
    shape: tuple[Dimension, ...]

    def describe(self) -> DynamicPluginTensorDesc:
        described = DynamicPluginTensorDesc()
        described.desc = PluginTensorDesc()
        described.desc.dims = Dims(size if isinstance(size, int) else -1 for size in self.shape)
        described.desc.type = self.dtype
        described.desc.format = TensorFormat.LINEAR
        for index, bound in enumerate(("min", "opt", "max")):
            setattr(described, bound, tuple(size if isinstance(size, int) else size[index] for size in self.shape))
        return described

    def expressions(self) -> list[Expression]:
        def expression(axis: int, size: Dimension) -> Expression:
            if isinstance(size, int):
                return Expression(lambda _: size, True)
            return Expression(lambda sizes: sizes[f"{self.name}.{axis}"], False)

        return [expression(axis, size) for axis, size in enumerate(self.shape)]


TensorFormat = enum.Enum("TensorFormat", "LINEAR CHW2 HWC8")
QuickPluginCreationRequest = enum.Enum(
    "QuickPluginCreationRequest", "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT"
)


@dataclass
class Layer:
    """What TensorRT would know of a plugin layer after building it with one tactic."""

    output_types: list[Any]
    output_shapes: list[list[Expression]]
    aliased_inputs: list[int]
    tactics: list[int]
    supported_types: list[Any]
    kernel_name: str = ""
    kernel: bytes = b""
    launch: dict[str, Expression] = field(default_factory=dict)
    extras: list[Any] = field(default_factory=list)

    def get_output(self, index: int) -> int:
        return index


class Network:
    """The one method of `INetworkDefinition` that adds plugins; the last one added is `layer`."""

    def __init__(self, tactic: int | None = None) -> None:
        self.tactic = tactic
        self.layer: Layer

    def add_plugin(self, plugin: Callable[..., Any], aot: bool) -> Layer:
        inputs, shape_inputs, made = plugin(QuickPluginCreationRequest.STRICT_AOT)
        assert aot and not shape_inputs
        self.layer = build(made, inputs, self.tactic)
        return self.layer


def build(plugin: Any, inputs: list[ITensor], tactic: int | None) -> Layer:
    """Ask `plugin` for everything the builder needs; of its tactics, choose `tactic` or else the first."""
    builder = ExpressionBuilder()
    assert plugin.get_num_outputs() >= 1
    types = plugin.get_output_data_types([tensor.dtype for tensor in inputs], [len(tensor.shape) for tensor in inputs])
    shapes = plugin.get_output_shapes([tensor.expressions() for tensor in inputs], [], builder)
    dynamic = {
        f"{tensor.name}.{axis}": size[2]
        for tensor in inputs
        for axis, size in enumerate(tensor.shape)
        if not isinstance(size, int)
    }
    outputs = [
        ITensor(f"output{index}", dtype, tuple(dimension.value(dynamic) for dimension in shape))
        for index, (dtype, shape) in enumerate(zip(types, shapes, strict=True))
    ]
    described = [tensor.describe() for tensor in (*inputs, *outputs)]
    supported = plugin.get_supported_format_combinations(described, len(inputs))
    plugin.configure_plugin(described[: len(inputs)], described[len(inputs) :])
    tactics = plugin.get_valid_tactics()
    layer = Layer(
        types,
        shapes,
        [plugin.get_aliased_input(index) for index in range(len(outputs))],
        tactics,
        [one.type for one in supported],
    )
    plugin.set_tactic(tactics[0] if tactic is None else tactic)
    launch, extras = Object(), SymExprs()
    expressions = [tensor.expressions() for tensor in inputs]
    plugin.get_launch_params(expressions, described, len(inputs), launch, extras, builder)
    layer.launch = {name: value.expr for name, value in vars(launch).items()}
    layer.extras = list(extras)
    flat = [one.desc for one in described]
    name, layer.kernel = plugin.get_kernel(flat[: len(inputs)], flat[len(inputs) :])
    layer.kernel_name = name
    return layer


def _module() -> ModuleType:
    module = ModuleType("tensorrt")
    registry = Registry()

    class Logger(Object):
        WARNING = enum.auto()

        def log(self, severity: Any, message: str) -> None:
            pass

    members = (
        DataType, DimensionOperation, DimsExprs, Dims, DynamicPluginTensorDesc, ITensor, Logger, PluginField,
        PluginTensorDesc, QuickPluginCreationRequest, TensorFormat,
    )  # fmt: skip
    for member in members:
        setattr(module, member.__name__, member)
    plain = (
        "IPluginV3", "IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickAOTBuild", "IPluginV3QuickRuntime",
        "IPluginCreatorV3Quick", "ISymExpr", "INetworkDefinition",
    )  # fmt: skip
    for name in plain:
        setattr(module, name, type(name, (Object,), {}))
    enums = {
        "PluginFieldType": "INT8 INT16 INT32 INT64 FLOAT16 FLOAT32 FLOAT64 CHAR UNKNOWN",
        "PluginArgType": "INT",
        "PluginArgDataType": "INT8 INT16 INT32",
        "TensorRTPhase": "BUILD RUNTIME",
    }
    for name, values in enums.items():
        setattr(module, name, enum.Enum(name, values))
    names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "fp8": "FP8", "int32": "INT32", "bool": "BOOL"}
    for name, value in names.items():
        setattr(module, name, DataType[value])
    module.IDimensionExpr = Expression  # type: ignore[attr-defined]
    module.PluginFieldCollection = list  # type: ignore[attr-defined]
    module.get_plugin_registry = lambda: registry  # type: ignore[attr-defined]
    return module


def _plugin_package() -> Path:
    """The `plugin` directory of the installed bindings, found without importing them."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "plugin"


@contextmanager
def tensorrt_shim() -> Iterator[ModuleType]:
    """Within the context ``import tensorrt`` gives the shim and ``import plugins.qdp`` registers with it."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "tensorrt"}
    module = sys.modules["tensorrt"] = _module()
    package = _plugin_package()
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None and spec.loader is not None
    plugin = sys.modules["tensorrt.plugin"] = importlib.util.module_from_spec(spec)
    module.plugin = plugin  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of escape sequences in the package's docstrings
            spec.loader.exec_module(plugin)
        yield module
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt" or name == "plugins.qdp"]:
            del sys.modules[name]
        sys.modules.update(hidden)
