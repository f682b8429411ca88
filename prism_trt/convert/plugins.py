"""The plugins of ``plugins/`` in networks: module weights read in place, K/V written to and read from the whole pool.

Networks of TensorRT get plugin layers through its own `tensorrt.plugin` package. Those of bindings without plugins keep
gaps that only the walker fills (`Graph.plugin`): enough to check such a network on a machine without TensorRT.

Shape legend: as in `prism_trt.convert.transformer`; S slots of the pool, W in-flight entries.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from prism_trt.config import DrafterConfig
from prism_trt.convert.graph import Emitted, Graph, Value, data_type
from prism_trt.convert.transformer import Attention, StackedLinear
from prism_trt.engines.tensorrt.names import CALL_TOKENS, IN_FLIGHT, LENGTHS, ROWS, SLOTS, TREE, cache_names
from prism_trt.errors import PrismError
from prism_trt.resources import resource

STEP_LINEAR, POOL_ATTENTION = "step_linear", "pool_attention"
"""The plugins' names."""

_TRITON_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv"}
_PACKAGE = "plugins"


@dataclass(frozen=True)
class Plugins:
    """What plugin layers are made for."""

    slots: int
    """Of the K/V pool."""
    compute_capability: int
    """Of the GPU: 80, 89 or 90."""
    kernels: Path
    """A directory of compiled kernels; those that it lacks are added during the build."""

    @property
    def build(self) -> dict[str, Any]:
        """Keyword arguments of the functions that add the layers."""
        return {"compute_capability": self.compute_capability, "kernels": self.kernels}

    def linear(self, graph: Graph, x: Value, stacked: StackedLinear, module: Value, name: str) -> Value:
        """The `StepLinear` that reads the matrices where they are; `module` is [B, T]."""
        optional = {"scales": stacked.scales, "bias": stacked.bias}
        inputs = {"x": x, "weights": stacked.matrices, "module_of_token": module}
        inputs |= {key: value for key, value in optional.items() if value is not None}

        def add(network: Any, layer: str) -> Value:
            return _module("qdp").add_step_linear(network, **inputs, **self.build, name=layer)

        return graph.plugin(STEP_LINEAR, inputs, (ROWS, CALL_TOKENS, stacked.matrices.shape[1]), add, name)


class SlotPool:
    """The whole K/V pool as inputs and outputs of a network, with the slots, lengths and mask that say what is live."""

    def __init__(self, graph: Graph, config: DrafterConfig, capacity: int, plugins: Plugins) -> None:
        """Declare them."""
        self._graph, self._build = graph, plugins.build
        self._common = {
            "slots": graph.input(SLOTS, torch.int32, (ROWS,)),
            "lengths": graph.input(LENGTHS, torch.int32, (ROWS,)),
            "mask": graph.input(TREE, torch.bool, (ROWS, CALL_TOKENS, IN_FLIGHT)),
        }
        shape = (plugins.slots, config.num_kv_heads, capacity, config.head_dim)
        self._pools = [
            {
                pool: graph.input(name.before, graph.dtype, shape)
                for pool, name in zip(("k_pool", "v_pool"), cache_names(layer), strict=True)
            }
            for layer in range(config.num_layers)
        ]

    def attention(self, layer: int) -> Attention:
        """The attention of layer `layer` over the pool."""
        graph, build = self._graph, self._build
        after = [name.after for name in cache_names(layer)]

        def attention(queries: Value, keys: Value, values: Value) -> Value:
            by_token = [graph.reshape(value, (0, 0, 0, 0), (0, 2, 1, 3)) for value in (queries, keys, values)]
            inputs = dict(zip(("q", "k", "v"), by_token, strict=True)) | self._pools[layer] | self._common

            def add(network: Any, name: str) -> Value:
                attended, *pools = _module("qdp").add_pool_attention(network, **inputs, **build, name=name)
                for output, pool in zip(after, pools, strict=True):
                    graph.output(output, pool)
                return attended

            _, heads, _, width = queries.shape
            attended = graph.plugin(POOL_ATTENTION, inputs, (ROWS, CALL_TOKENS, heads, width), add, "attend")
            return graph.reshape(attended, (0, 0, heads * width), name="join_heads")

        return attention


def compile_kernels(emitted: Emitted, most_tokens: int, plugins: Plugins) -> None:
    """Compile all that a build of the plugin layers of `emitted` may ask for into the directory `plugins.kernels`.

    Args:
        emitted: for bindings with or without plugins.
        most_tokens: of the largest call, in all its rows.
        plugins: those that it was emitted for.

    Raises:
        PrismError: Triton is not installed.
    """
    linear, pool = _module("step_linear"), _module("pool_attention")
    types = {data_type(emitted.trt, dtype): name for dtype, name in _TRITON_TYPES.items()}
    build = (plugins.compute_capability, plugins.kernels)
    for layer in emitted.plugins:
        given = layer.inputs
        if layer.plugin == STEP_LINEAR:
            x, weights = given["x"], given["weights"]
            of_layer = (types[x.dtype], types[weights.dtype], tuple(weights.shape), "scales" in given, "bias" in given)
            for number in linear.tactics_for(most_tokens):
                linear.compile_step_linear(*of_layer, linear.TACTICS[number], *build)
        else:
            heads = given["q"].shape[2]
            _, kv_heads, capacity, width = given["k_pool"].shape
            for number in pool.tactics_for(most_tokens * (heads // kv_heads)):
                tiles = pool.TACTICS[number]
                pool.compile_pool_attention(types[given["q"].dtype], heads, kv_heads, width, capacity, tiles, *build)


def _module(name: str) -> ModuleType:
    """A module of ``plugins/``, which lies beside this package.

    Raises:
        PrismError: Triton is not installed.
    """
    if _PACKAGE not in sys.modules:
        directory = resource(_PACKAGE)
        spec = importlib.util.spec_from_file_location(
            _PACKAGE, directory / "__init__.py", submodule_search_locations=[str(directory)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[_PACKAGE] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    try:
        return importlib.import_module(f"{_PACKAGE}.{name}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise PrismError("TensorRT plugins need triton: install it with pip install 'prism-trt[plugins]'") from None
