"""Read the dump of fused layers that TensorRT logs at the end of a build with detailed verbosity.

It shows what no engine inspector shows without a GPU: which kernels were chosen, and which weights are copied.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from prism_trt.errors import PrismError

_FIELDS = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>.*?), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<kernel>.*?), StreamId: "
)
_INNER_BRACKETS = re.compile(r"(Dimensions|Strides|StrideOrder): \[([-\d,]*)\]")
_EIGHT_BITS = ("FP8", "Int8")
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: <(?P<shape>[-\d,]*)>.*?Datatype: (?P<dtype>\w+)")


@dataclass(frozen=True)
class BuiltTensor:
    """An input, constant or output of a built layer."""

    name: str
    shape: tuple[int, ...]
    """-1 where dynamic."""
    dtype: str
    """TensorRT's name, such as ``Half``."""


@dataclass(frozen=True)
class BuiltLayer:
    """One kernel, or one host operation, of a plan."""

    name: str
    kind: str
    """Such as ``kgen`` (generated code), ``gemm`` or ``kernel``."""
    kernel: str
    """The kernel's name; empty for host operations."""
    inputs: tuple[BuiltTensor, ...]
    constants: tuple[BuiltTensor, ...]
    outputs: tuple[BuiltTensor, ...]


def parse_layers(dump: str) -> list[BuiltLayer]:
    """The layers of a dump, in order of execution.

    Raises:
        PrismError: a line is not of the known form.
    """
    return [_layer(line) for line in dump.splitlines() if line.startswith("Name: ")]


def _layer(line: str) -> BuiltLayer:
    fields = _FIELDS.match(_INNER_BRACKETS.sub(r"\1: <\2>", line))
    if fields is None:
        raise PrismError(f"the layer dump has a line of an unknown form: {line[:120]}")
    return BuiltLayer(
        name=fields["name"],
        kind=fields["kind"],
        kernel=fields["kernel"],
        inputs=_tensors(fields["inputs"]),
        constants=_tensors(fields["constants"]),
        outputs=_tensors(fields["outputs"]),
    )


def _tensors(text: str) -> tuple[BuiltTensor, ...]:
    return tuple(
        BuiltTensor(found["name"], tuple(map(int, filter(None, found["shape"].split(",")))), found["dtype"])
        for found in _TENSOR.finditer(text)
    )


def fused_attentions(layers: Sequence[BuiltLayer]) -> list[BuiltLayer]:
    """The layers that are TensorRT's fused attention kernels."""
    return [layer for layer in layers if "_mha_" in layer.name]


def expanded_heads(layers: Sequence[BuiltLayer]) -> list[BuiltLayer]:
    """The layers that copy keys or values to all the query heads that share them."""
    return [layer for layer in layers if "ReshReplReshMove" in layer.name]


def copied_weights(layers: Sequence[BuiltLayer]) -> list[str]:
    """Names of the matrices, or stacks of matrices, of which a layer writes a copy or copies one member."""
    return [
        constant.name
        for layer in layers
        for constant in layer.constants
        if len(constant.shape) > 1
        and any(output.shape in (constant.shape, (1, *constant.shape[1:])) for output in layer.outputs)
    ]


def quantized_products(layers: Sequence[BuiltLayer]) -> list[BuiltLayer]:
    """The layers that multiply with an 8-bit matrix: library products and generated ones (``Fc``)."""
    products = [layer for layer in layers if layer.kind == "gemm" or "Fc" in layer.name]
    return [
        layer
        for layer in products
        if any(len(constant.shape) > 1 and constant.dtype in _EIGHT_BITS for constant in layer.constants)
    ]
