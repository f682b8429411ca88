"""Blocks that the target's and the drafter's networks are made of.

Shape legend: B rows, T tokens per row, H hidden width, h query heads, g key/value heads, d head width, C capacity of
the K/V pool, L live entries of it (the width of the mask), M modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from prism_trt.config import DrafterConfig
from prism_trt.convert.graph import Graph, Value
from prism_trt.convert.quantized import quantized_linear
from prism_trt.drafter.model import DrafterLayer
from prism_trt.engines.tensorrt.names import CALL_TOKENS, LIVE, MASK, ROWS, WRITE_INDEX, cache_names
from prism_trt.quantize.scales import UNQUANTIZED, Scales, to_quantized
from prism_trt.target.config import TargetConfig
from prism_trt.target.model import DecoderLayer, RMSNorm, rope_tables

INPUT_NORM, QKV, OUT, MLP_NORM, GATE_UP, DOWN = "input_norm", "qkv", "o", "mlp_norm", "gate_up", "down"


class Weights(Protocol):
    """The weights of one transformer layer, by the names that `layer_tensors` gives them."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor `name`."""
        ...

    def linear(self, x: Value, name: str) -> Value:
        """[B, T, I] times the matrix `name` [O, I], plus its bias when it has one: [B, T, O]."""
        ...

    def scale(self, x: Value, name: str) -> Value:
        """[B, T, H] times the vector `name` [H]."""
        ...


@dataclass(frozen=True)
class FixedWeights:
    """Weights known when the network is built; `tensors` by name, stored in the network as ``prefix.name``."""

    graph: Graph
    prefix: str
    tensors: Mapping[str, Tensor]
    scales: Scales = field(default_factory=lambda: UNQUANTIZED)
    """Of the matrices to quantise, by their names in the network."""

    def has(self, name: str) -> bool:
        """See `Weights.has`."""
        return name in self.tensors

    def linear(self, x: Value, name: str) -> Value:
        """See `Weights.linear`."""
        full, content = f"{self.prefix}.{name}", self.tensors[name][None]
        if scales := self.scales.get(full):
            y = quantized_linear(self.graph, x, full, content, scales, name)
        else:
            y = self.graph.matmul_transposed(x, self.graph.weight(full, content), name)
        return self.graph.add(y, self._vector(f"{name}.bias"), f"{name}.bias") if self.has(f"{name}.bias") else y

    def scale(self, x: Value, name: str) -> Value:
        """See `Weights.scale`."""
        return self.graph.multiply(x, self._vector(name), name)

    def _vector(self, name: str) -> Value:
        return self.graph.weight(f"{self.prefix}.{name}", self.tensors[name][None, None])


@dataclass(frozen=True)
class StackedLinear:
    """One linear layer of all modules."""

    matrices: Value
    """[M, O, I]."""
    bias: Value | None
    """[M, O]."""
    scales: Value | None
    """float32 [M]: what the results of 8-bit matrices are multiplied by."""


StepLinear = Callable[[Graph, Value, StackedLinear, Value, str], Value]
"""Maps x [B, T, I], a stacked layer, module indices (those of `SelectedWeights`) and a layer name to [B, T, O]."""


def gathered_linear(graph: Graph, x: Value, stacked: StackedLinear, module: Value, name: str) -> Value:
    """The `StepLinear` of runtimes without plugins: copies the matrix of `module` [1, 1], then multiplies with it."""
    assert stacked.scales is None
    index = graph.reshape(module, (1,), name=f"{name}.module")
    y = graph.matmul_transposed(x, graph.gather(stacked.matrices, index, axis=0, name=f"{name}.select"), name)
    if stacked.bias is None:
        return y
    return graph.add(y, graph.gather(stacked.bias, module, axis=0, name=f"{name}.bias.select"), f"{name}.bias")


@dataclass(frozen=True)
class SelectedWeights:
    """The weights of M modules, one mapping each, of which indices at run time select one for each token."""

    graph: Graph
    prefix: str
    tensors: Sequence[Mapping[str, Tensor]]
    module: Value
    """int32 [B, T], or [1, 1] for all tokens of a call."""
    step_linear: StepLinear
    scales: Scales = field(default_factory=lambda: UNQUANTIZED)
    """Of the matrices to quantise, by their names in `tensors`; of each, one number per module."""

    def has(self, name: str) -> bool:
        """See `Weights.has`."""
        return name in self.tensors[0]

    def linear(self, x: Value, name: str) -> Value:
        """See `Weights.linear`."""
        full, bias, scales = f"{self.prefix}.{name}", None, self.scales.get(name)
        if self.has(f"{name}.bias"):
            bias = self._stacked(f"{name}.bias")
        if scales is None:
            stacked = StackedLinear(self._stacked(name), bias, None)
        else:
            content = partial(to_quantized, self._stack(name), scales.weight.reshape(-1, 1, 1), scales.dtype)
            matrices = self.graph.weight(full, content, scales.dtype)
            stacked = StackedLinear(matrices, bias, self.graph.weight(f"{full}.scales", scales.weight, torch.float32))
        return self.step_linear(self.graph, x, stacked, self.module, name)

    def scale(self, x: Value, name: str) -> Value:
        """See `Weights.scale`."""
        selected = self.graph.gather(self._stacked(name), self.module, axis=0, name=f"{name}.select")
        return self.graph.multiply(x, selected, name)

    def _stack(self, name: str) -> Tensor:
        return torch.stack([tensors[name] for tensors in self.tensors])

    def _stacked(self, name: str) -> Value:
        return self.graph.weight(f"{self.prefix}.{name}", partial(self._stack, name))


def layer_linears(layer: DecoderLayer | DrafterLayer) -> dict[str, list[nn.Linear]]:
    """The linear layers of `layer`, those that are fused into one matrix together."""
    attention, mlp = layer.self_attn, layer.mlp
    return {
        QKV: [attention.q_proj, attention.k_proj, attention.v_proj],
        OUT: [attention.o_proj],
        GATE_UP: [mlp.gate_proj, mlp.up_proj],
        DOWN: [mlp.down_proj],
    }


def layer_tensors(layer: DecoderLayer | DrafterLayer) -> dict[str, Tensor]:
    """The layer's weights, with q, k, v and gate, up each fused into one matrix."""
    tensors: dict[str, Tensor] = {MLP_NORM: layer.post_attention_layernorm.weight}
    if isinstance(layer.input_layernorm, RMSNorm):
        tensors[INPUT_NORM] = layer.input_layernorm.weight
    for name, parts in layer_linears(layer).items():
        tensors[name] = torch.cat([part.weight for part in parts]) if len(parts) > 1 else parts[0].weight
        if parts[0].bias is not None:
            tensors[f"{name}.bias"] = torch.cat([part.bias for part in parts])
    return tensors


def linear_tensors(linear: nn.Linear, name: str) -> dict[str, Tensor]:
    """Weight and, when there is one, bias of `linear` as `Weights` names them."""
    return {name: linear.weight} if linear.bias is None else {name: linear.weight, f"{name}.bias": linear.bias}


@dataclass(frozen=True)
class Rope:
    """Rotary tables as constants, [P, d / 2] each."""

    cosines: Value
    sines: Value


def rope_constants(graph: Graph, config: TargetConfig | DrafterConfig, length: int) -> Rope:
    """Tables for positions 0..length-1, rescaled as the config says."""
    cosines, sines = rope_tables(config, length)
    return Rope(graph.weight("rope.cosines", cosines), graph.weight("rope.sines", sines))


def pick(graph: Graph, rows: Value, picked: Value) -> Value:
    """[B, R, H]: the tokens `picked` [B, R] of each row of [B, T, H]."""
    return graph.gather(rows, picked, axis=1, batch_axes=1, name="pick")


def rms_norm(graph: Graph, x: Value, eps: float) -> Value:
    """``x / sqrt(mean(x^2) + eps)`` over the last axis of [B, T, H], computed in float32.

    TensorRT's own normalization subtracts the mean; it fuses this form into one kernel.
    """
    wide = graph.cast(x, torch.float32)
    mean = graph.reduce("AVG", graph.multiply(wide, wide, "square"), len(x.shape) - 1, "mean")
    root = graph.unary("SQRT", graph.add(mean, graph.number(eps, mean)), "root")
    normed = graph.multiply(wide, graph.unary("RECIP", root, "inverse"), "normalise")
    return graph.cast(normed, graph.dtype)


class Pool:
    """The K/V pool as inputs and outputs of a network, together with the mask that says what is live in it."""

    def __init__(self, graph: Graph, config: TargetConfig | DrafterConfig, capacity: int, tokens: Value) -> None:
        """Declare mask, write index and the pool of every layer for the network input `tokens` [B, T]."""
        groups, width = config.num_kv_heads, config.head_dim
        self._graph = graph
        self.rows = graph.size(tokens, 0)
        """int64 [1]: B."""
        self.mask = graph.input(MASK, graph.dtype, (ROWS, 1, CALL_TOKENS, LIVE))
        """[B, 1, T, L], added to attention scores."""
        self.live = graph.size(self.mask, 3)
        """int64 [1]: L."""
        self._index = graph.input(WRITE_INDEX, torch.int32, (ROWS,))
        self._window = graph.sizes((self.rows, groups, self.live, width))
        shape = (ROWS, groups, capacity, width)
        self._names = [cache_names(layer) for layer in range(config.num_layers)]
        self._entries = [tuple(graph.input(name.before, graph.dtype, shape) for name in pair) for pair in self._names]

    def attention(self, layer: int) -> Attention:
        """The attention of layer `layer` over the pool."""
        return native_attention(self._graph, self.mask, self.update, layer)

    def update(self, layer: int, keys: Value, values: Value) -> tuple[Value, Value]:
        """Write keys and values [B, g, T, d] and return the live entries [B, g, L, d].

        Attention must not read the whole pool: TensorRT would then copy every entry to all query heads.
        """
        live = []
        for name, entries, new in zip(self._names[layer], self._entries[layer], (keys, values), strict=True):
            updated = self._graph.update_cache(entries, new, self._index, name.kind)
            self._graph.output(name.after, updated)
            live.append(self._graph.window(updated, self._window, name=f"live_{name.kind}"))
        return live[0], live[1]


Attention = Callable[[Value, Value, Value], Value]
"""Takes a call's rotated queries [B, h, T, d], rotated keys [B, g, T, d] and values [B, g, T, d], stores the latter two
and returns what the queries read, [B, T, h * d]."""

Remember = Callable[[int, Value, Value], tuple[Value, Value]]
"""Takes a layer's number, and its new keys and values [B, g, T, d]; returns all that the layer's queries may read."""


def native_attention(graph: Graph, mask: Value, remember: Remember, layer: int) -> Attention:
    """TensorRT's own attention over what `remember` returns; `mask` [B, 1, T, L] is added to the scores."""

    def attention(queries: Value, keys: Value, values: Value) -> Value:
        _, heads, _, width = queries.shape
        scaled = graph.multiply(queries, graph.number(width**-0.5, queries), "scale_queries")
        attended = graph.attend(scaled, *remember(layer, keys, values), mask, "attend")
        return graph.transpose(attended, (0, 2, 1, 3), (0, 0, heads * width), "join_heads")

    return attention


def transformer_layer(
    graph: Graph,
    config: TargetConfig | DrafterConfig,
    weights: Weights,
    x: Value,
    positions: Value,
    rope: Rope,
    attention: Attention,
) -> Value:
    """One layer over x [B, T, H] at positions [B, T]: [B, T, H]."""
    with graph.scope("attention"):
        normed = weights.scale(rms_norm(graph, x, config.rms_norm_eps), INPUT_NORM) if weights.has(INPUT_NORM) else x
        attended = attention(*_qkv(graph, config, weights, normed, positions, rope))
        x = graph.add(x, weights.linear(attended, OUT), "residual")
    with graph.scope("mlp"):
        normed = weights.scale(rms_norm(graph, x, config.rms_norm_eps), MLP_NORM)
        fused = weights.linear(normed, GATE_UP)
        width = config.intermediate_size
        gate, up = graph.part(fused, 2, 0, width, "gate"), graph.part(fused, 2, width, width, "up")
        gated = graph.multiply(graph.multiply(gate, graph.sigmoid(gate), "silu"), up, "gated")
        return graph.add(x, weights.linear(gated, DOWN), "residual")


def _qkv(
    graph: Graph, config: TargetConfig | DrafterConfig, weights: Weights, x: Value, positions: Value, rope: Rope
) -> tuple[Value, Value, Value]:
    """Rotated queries [B, h, T, d], rotated keys and values [B, g, T, d] of x [B, T, H]."""
    heads, groups, width = config.num_heads, config.num_kv_heads, config.head_dim
    fused = graph.reshape(weights.linear(x, QKV), (0, 0, heads + 2 * groups, width), (0, 2, 1, 3), "split_heads")
    queries = graph.part(fused, 1, 0, heads, "queries")
    keys = graph.part(fused, 1, heads, groups, "new_keys")
    values = graph.part(fused, 1, heads + groups, groups, "new_values")
    queries = graph.rotate(queries, rope.cosines, rope.sines, positions, "rotate_queries")
    keys = graph.rotate(keys, rope.cosines, rope.sines, positions, "rotate_keys")
    return queries, keys, values
