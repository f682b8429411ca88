"""TensorRT-RTX's network API together with the plugin layers of the shim: networks as TensorRT itself would hold them.

Everything but the plugin layers is TensorRT's own code. An output of a plugin layer is a network input behind an
identity layer, with the type and shape that NVIDIA's `tensorrt.plugin` package gives it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from tests.plugins.tensorrt_shim import DataType, ITensor, Layer, QuickPluginCreationRequest, build

LEAST_USUAL_MOST = (1, 8, 64)
"""Of every dynamic dimension."""


class PluginBindings:
    """The module `rtx`, whose networks have `add_plugin` while the shim is `tensorrt`."""

    class INetworkDefinition:
        def add_plugin(self) -> None: ...

    def __init__(self, rtx: Any, shim: ModuleType) -> None:
        shim.ITensor = rtx.ITensor  # type: ignore[attr-defined]  # what the plugin package takes as a tensor
        self._rtx = rtx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rtx, name)

    def Builder(self, logger: Any) -> Any:
        return _Builder(self._rtx, self._rtx.Builder(logger))


@dataclass
class _Builder:
    rtx: Any
    builder: Any

    def create_network(self, flags: int) -> PluginNetwork:
        return PluginNetwork(self.rtx, self.builder.create_network(flags))


@dataclass
class PluginNetwork:
    """A network; `layers` are its plugin layers as the builder would know them, once for every tactic."""

    rtx: Any
    network: Any
    layers: list[PluginLayer] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def add_plugin(self, plugin: Any, aot: bool) -> PluginLayer:
        assert aot
        inputs, shape_inputs, _ = plugin(QuickPluginCreationRequest.STRICT_AOT)
        assert not shape_inputs
        described = [
            ITensor(
                tensor.name,
                DataType[tensor.dtype.name],
                tuple(LEAST_USUAL_MOST if size < 0 else size for size in tensor.shape),
            )
            for tensor in inputs
        ]

        def built(tactic: int | None) -> Layer:
            return build(plugin(QuickPluginCreationRequest.STRICT_AOT)[2], described, tactic)

        first = built(None)
        outputs: list[Any] = []
        for dtype, shape in zip(first.output_types, first.output_shapes, strict=True):
            sizes = [size.get_constant_value() if size.is_constant() else -1 for size in shape]
            name = f"plugin{len(self.layers)}.{len(outputs)}"
            value = self.network.add_input(name, getattr(self.rtx.DataType, dtype.name), sizes)
            outputs.append(self.network.add_identity(value).get_output(0))
        layer = PluginLayer([built(tactic) for tactic in first.tactics], described, outputs)
        self.layers.append(layer)
        return layer


@dataclass
class PluginLayer:
    tactics: list[Layer]
    inputs: list[ITensor]
    outputs: list[Any]
    name: str = ""

    def get_output(self, index: int) -> Any:
        return self.outputs[index]
