"""How TensorRT-RTX selects a module's weights, from its own lists of kernels: bytes moved, launches, host operations.

``python scripts/compare_selection.py`` builds one module's pass (fusion layer and transformer layer; no embedding, no
head) in each way that needs no plugin, for compute capability 8.9 and without a GPU. The drafter has two modules of
LLaMA-3-8B's shape at an eighth of every width, so that its matrices have a 64th of the bytes; bytes are printed for the
full widths. Of the way with plugins, what lies between the plugin layers is built; each of these is one launch more.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tensorrt_rtx_bindings as trt
import torch
from torch import Tensor

from prism_trt.config import DrafterConfig, TreeShape
from prism_trt.convert.compile import compile_network, serving_profile
from prism_trt.convert.drafter import emit_round
from prism_trt.convert.graph import Emitted, Graph, Value
from prism_trt.convert.layers import BuiltLayer, BuiltTensor, parse_layers
from prism_trt.convert.plugins import Plugins, SlotPool
from prism_trt.convert.transformer import (
    FixedWeights,
    Pool,
    SelectedWeights,
    StackedLinear,
    Weights,
    gathered_linear,
    layer_tensors,
    linear_tensors,
    rope_constants,
    transformer_layer,
)
from prism_trt.drafter.model import Drafter, ProcessingModule
from prism_trt.engines.tensorrt.binding import NetworkLimits
from prism_trt.engines.tensorrt.names import CALL_TOKENS, HIDDEN, NEXT_HIDDEN, POSITIONS, ROWS, STEP
from prism_trt.target.config import TargetConfig
from prism_trt.target.model import LlamaModel

MODULES = 2
SCALE = 8
LIMITS = NetworkLimits(slots=8, context=2048, prefill_tokens=64, shared_tokens=64)
CAPABILITY = 89
ROUND = TreeShape.parse("60/10/6")
WEIGHT = 1 << 16
"""Elements from which on a float16 tensor of fixed shape is a matrix of a module; embedding and head have fewer."""
OFF_DEVICE = {"shape_call", "signal", "wait", "jmp", "cjmp"}
"""Kinds of layers that launch nothing."""


@dataclass(frozen=True)
class InputWeights:
    """Matrices as network inputs, whose addresses the host sets for every step."""

    graph: Graph
    fixed: FixedWeights

    def has(self, name: str) -> bool:
        return self.fixed.has(name)

    def linear(self, x: Value, name: str) -> Value:
        matrix = self.graph.input(f"{self.fixed.prefix}.{name}", torch.float16, (1, *self.fixed.tensors[name].shape))
        return self.graph.matmul_transposed(x, matrix, name)

    def scale(self, x: Value, name: str) -> Value:
        return self.fixed.scale(x, name)


def conditional_linear(graph: Graph, x: Value, stacked: StackedLinear, module: Value, name: str) -> Value:
    """A `StepLinear` for two modules: TensorRT's conditional, with one product in each branch."""
    network = graph._network
    is_first = graph.elementwise("EQUAL", module, graph.number(0, module), f"{name}.is_first")
    conditional = network.add_if_conditional()
    conditional.set_condition(graph.reshape(is_first, (), name=f"{name}.condition"))
    entering = conditional.add_input(x).get_output(0)
    first, second = (
        graph.matmul_transposed(entering, graph.part(stacked.matrices, 0, number, 1, f"{name}.{number}"), name)
        for number in range(MODULES)
    )
    return conditional.add_output(first, second).get_output(0)


def drafter_and_target() -> tuple[Drafter, LlamaModel]:
    """Random, so that all constants differ: equal ones would be stored once."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 4096 // SCALE,
        "intermediate_size": 14336 // SCALE,
        "num_heads": 32 // SCALE,
        "num_kv_heads": 8 // SCALE,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
    }
    target = TargetConfig(
        **shape,
        vocab_size=WEIGHT // (8192 // SCALE),
        num_layers=1,
        tie_word_embeddings=True,
        qkv_bias=False,
        max_position_embeddings=LIMITS.capacity,
        eos_token_ids=(0,),
        bos_token_id=None,
    )
    config = DrafterConfig(**shape, num_modules=MODULES, step_map=tuple(range(MODULES)), target_fingerprint="none")
    return Drafter(config, None, target.vocab_size), LlamaModel(target)


def emit(
    config: DrafterConfig, weights_of: Callable[[Graph, int, Value], Weights], plugins: Plugins | None = None
) -> Emitted:
    """One module's pass; `weights_of` gives the weights of the fusion layer (0) or of the transformer layer (1)."""
    graph = Graph(trt, torch.float16)
    rows = (ROWS, CALL_TOKENS, config.hidden_size)
    x, hidden = graph.input("x", torch.float16, rows), graph.input(HIDDEN, torch.float16, rows)
    positions = graph.input(POSITIONS, torch.int32, (ROWS, CALL_TOKENS))
    module = graph.input(STEP, torch.int32, (ROWS, CALL_TOKENS) if plugins else (1, 1))
    pool = SlotPool(graph, config, LIMITS.capacity, plugins) if plugins else Pool(graph, config, LIMITS.capacity, x)
    rope = rope_constants(graph, config, LIMITS.capacity)
    fused = weights_of(graph, 0, module).linear(graph.concat((x, hidden), 2), "fc")
    y = transformer_layer(graph, config, weights_of(graph, 1, module), fused, positions, rope, pool.attention(0))
    graph.output(NEXT_HIDDEN, graph.identity(y, "output"))
    return graph.finish()


def networks() -> Iterator[tuple[str, Emitted]]:
    """Every way's network by its name."""
    drafter, target = drafter_and_target()
    config = drafter.config
    parts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = [
        (linear_tensors(module.fc, "fc"), layer_tensors(module.stack[0]))
        for module in drafter.modules_
        if isinstance(module, ProcessingModule) and module.fc is not None
    ]

    def fixed(graph: Graph, part: int, module: Value) -> FixedWeights:
        return FixedWeights(graph, f"modules.0.{part}", parts[0][part])

    def selected(step_linear: Any) -> Callable[[Graph, int, Value], Weights]:
        def weights_of(graph: Graph, part: int, module: Value) -> Weights:
            return SelectedWeights(graph, f"modules.{part}", [of[part] for of in parts], module, step_linear)

        return weights_of

    plugins = Plugins(LIMITS.slots, CAPABILITY, Path())
    yield "plugins", emit(config, selected(plugins.linear), plugins)
    yield "gather from stacked weights", emit(config, selected(gathered_linear))
    yield "conditionals", emit(config, selected(conditional_linear))
    yield "weights as network inputs", emit(config, lambda *of: InputWeights(of[0], fixed(*of)))
    yield "one engine per module", emit(config, fixed)
    yield f"unrolled, tree {ROUND}", emit_round(trt, drafter, target, ROUND, LIMITS.capacity, torch.float16)


def between_plugins(emitted: Emitted) -> Emitted:
    """The network whose outputs are what the plugin layers read, so that nothing is left out of the build."""
    network = emitted.network
    known = {network.get_input(number).name for number in range(network.num_inputs)}
    constants = {
        emitted.network.get_layer(number).get_output(0).name
        for number in range(network.num_layers)
        if network.get_layer(number).type == trt.LayerType.CONSTANT
    }
    for layer in emitted.plugins:
        for value in layer.inputs.values():
            if value.name not in known | constants and not value.is_network_output:
                network.mark_output(value)
    return replace(emitted, plugins=())


def executed(layers: list[BuiltLayer]) -> Iterator[BuiltLayer]:
    """Of conditionals, the first branch only; each branch ends with a jump."""
    skipped = False
    for layer in layers:
        if layer.kind == "jmp":
            skipped = not skipped
        elif not skipped:
            yield layer


def weight_bytes(layer: BuiltLayer) -> int:
    """Bytes of weights that the layer reads or writes, at the drafter's full widths."""

    def size(tensor: BuiltTensor) -> int:
        elements = math.prod(tensor.shape)
        is_fixed = min(tensor.shape, default=0) > 0 and tensor.dtype == "Half" and "rope" not in tensor.name
        return 2 * elements * SCALE**2 if is_fixed and elements >= WEIGHT else 0

    gathers = any(map(size, layer.outputs))  # it reads one module's part of its constants
    constants = sum(map(size, layer.constants)) // (MODULES if gathers else 1)
    return constants + sum(map(size, (*layer.inputs, *layer.outputs)))


def main() -> None:
    print("| way | weight bytes moved, MB | launches | host waits |")
    print("|---|---|---|---|")
    drafter, _ = drafter_and_target()
    matrices = sum(each.numel() for each in drafter.modules_[0].parameters() if each.dim() > 1)
    for name, emitted in networks():
        plugins = len(emitted.plugins)
        with tempfile.TemporaryDirectory() as directory:
            plan = Path(directory) / "plan"
            dump = compile_network(between_plugins(emitted), serving_profile(LIMITS), plan, f"SM{CAPABILITY}")
        layers = list(executed(parse_layers(dump)))
        moved = sum(map(weight_bytes, layers)) + (2 * matrices * SCALE**2 if plugins else 0)
        launches = sum(layer.kind not in OFF_DEVICE for layer in layers) + plugins
        waits = sum("copy_d2h" in layer.name for layer in layers)
        print(f"| {name} | {moved / 1e6:,.0f} | {launches} | {waits} |", flush=True)


if __name__ == "__main__":
    main()
