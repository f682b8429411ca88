"""Products with quantised matrices: quantise and dequantise layers, which TensorRT turns into 8-bit products."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from prism_trt.convert.graph import Emitted, Graph, Value
from prism_trt.quantize.scales import LinearScales, to_quantized

_ROWS = 1
"""The axis of [1, O, I] that a scale per row runs along."""


def quantized_linear(graph: Graph, x: Value, full: str, matrix: Tensor, scales: LinearScales, name: str) -> Value:
    """[B, T, I] times `matrix` [1, O, I], the constant `full` of the network stored with `scales`: [B, T, O].

    The constant goes straight into its dequantise layer: TensorRT lets 8-bit constants feed nothing else that computes.
    """
    per_row = scales.weight.dim() > 0
    scale = scales.weight.reshape(-1, 1) if per_row else scales.weight
    stored = graph.weight(full, partial(to_quantized, matrix, scale, scales.dtype), scales.dtype)
    weight_scale = graph.weight(f"{full}.scale", scales.weight, torch.float32)
    weight = graph.dequantize(stored, weight_scale, f"{name}.dequantize", _ROWS if per_row else None)
    if scales.activation is not None:
        scale_of_x = graph.weight(f"{full}.activation_scale", scales.activation, torch.float32)
        rounded = graph.quantize(x, scale_of_x, scales.dtype, f"{name}.quantize_input")
        x = graph.dequantize(rounded, scale_of_x, f"{name}.dequantize_input")
    return graph.matmul_transposed(x, weight, name)


def quantized_matrices(emitted: Emitted) -> int:
    """Products with quantised matrices in the network `emitted`."""
    network, kinds = emitted.network, emitted.trt.LayerType
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    constants = {layer.get_output(0).name for layer in layers if layer.type == kinds.CONSTANT}
    return sum(layer.type == kinds.DEQUANTIZE and layer.get_input(0).name in constants for layer in layers)
