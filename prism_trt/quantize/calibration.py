"""Scales by ModelOpt: of the target and, in FP8, every module of the drafter, each on what it reads when it serves.

Embeddings and heads are not quantised. Matrices that a network fuses share one weight scale where a scale is per tensor
(the greatest one), because TensorRT then keeps the fused product a plain 8-bit one.
"""

from __future__ import annotations

import copy
import importlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prism_trt.convert.drafter import drafter_linears
from prism_trt.convert.target import target_linears
from prism_trt.data.sequences import FeatureSequence
from prism_trt.drafter.model import Drafter
from prism_trt.errors import PrismError
from prism_trt.quantize.quality import with_features
from prism_trt.quantize.scales import DRAFTED, STORED, LinearScales, Quantization, Scales, largest
from prism_trt.target.model import LlamaModel
from prism_trt.train.alignment import aligned_steps
from prism_trt.train.batch import pack

_SMALLEST = 1e-12
"""Of scales, so that a matrix of zeros has one."""
_QUANTIZERS: Mapping[Quantization, list[dict[str, Any]]] = {
    "fp8": [
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}},
    ],
    "int8": [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}}],
}
"""What ModelOpt's configuration says of weights and inputs."""
_UNQUANTIZED: list[dict[str, Any]] = [
    {"quantizer_name": "*lm_head*", "enable": False},
    {"quantizer_name": "*", "parent_class": "nn.Embedding", "enable": False},
]


class QuantizedModels(NamedTuple):
    """Models whose linear layers round as the quantised networks do, and the scales they round with."""

    model: LlamaModel
    drafter: Drafter | None
    scales: Scales


def calibrate(
    model: LlamaModel,
    drafter: Drafter | None,
    sequences: Sequence[FeatureSequence],
    quantization: Quantization,
    steps: int,
) -> QuantizedModels:
    """Scales from what the linear layers read while `sequences` pass through the models.

    Args:
        model: its tensors are shared, not changed.
        drafter: copied; quantised only by the kinds in `DRAFTED`.
        sequences: the target's answers; the drafter is fed with the features that the quantised target has on them.
        quantization: the kind.
        steps: draft steps, enough to use every module; module sigma(k) is calibrated on what step k reads.

    Raises:
        PrismError: ModelOpt is not installed, or a layer reads values that are not finite.
        ValueError: `steps` do not reach every module.
    """
    quantized = LlamaModel.from_state(model.config, model.state_dict())

    def answer(target: LlamaModel) -> None:
        for sequence in sequences:
            target.forward_sequence(sequence.tokens[None])

    _quantize(quantized, _QUANTIZERS[quantization], answer)
    scales = _shared_scales(target_linears(quantized), quantization)
    if drafter is None:
        return QuantizedModels(quantized, None, scales)
    own = serving_copy(drafter)
    if quantization not in DRAFTED:
        return QuantizedModels(quantized, own, scales)

    def draft(own: Drafter) -> None:
        for sequence in sequences:
            fed = with_features(quantized, drafter, sequence.tokens, sequence.prompt_length)
            aligned_steps(own, model.model.embed_tokens.weight, pack([fed]), steps)

    _quantize(own, _QUANTIZERS[quantization], draft)
    return QuantizedModels(quantized, own, {**scales, **_shared_scales(drafter_linears(own), quantization)})


def import_modelopt() -> Any:
    """ModelOpt's quantisation package.

    Raises:
        PrismError: it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of versions of transformers, which is not used here
        try:
            return importlib.import_module("modelopt.torch.quantization")
        except ImportError:
            raise PrismError("quantising needs ModelOpt: install it with pip install 'prism-trt[fp8]'") from None


def serving_copy(drafter: Drafter) -> Drafter:
    """A copy that runs in `aligned_steps` as it serves, whatever the K/V mode it was trained with."""
    own = copy.deepcopy(drafter)
    own.config = drafter.config.model_copy(update={"kv_mode": "producer"})
    return own


@torch.no_grad()
def _quantize(model: nn.Module, quantizers: list[dict[str, Any]], run: Callable[[Any], None]) -> None:
    """Give the linear layers of `model`, heads and embeddings excepted, quantizers calibrated to the greatest value."""
    modelopt = import_modelopt()
    chosen = [{"quantizer_name": "*", "enable": False}, *quantizers, *_UNQUANTIZED]
    with redirect_stdout(io.StringIO()):  # it prints how many quantizers it inserts
        try:
            modelopt.quantize(model, {"quant_cfg": chosen, "algorithm": "max"}, run)
        except AssertionError as error:  # how its calibrators refuse values that are not finite
            raise PrismError(f"calibration failed ({error}): inspect the weights, or pass other prompts") from None


def _shared_scales(linears: Mapping[str, Sequence[nn.Linear]], quantization: Quantization) -> Scales:
    """Scales of fused matrices by name; the quantizers of the linear layers are set to those that they share."""
    return {name: _scales_of(name, parts, quantization) for name, parts in linears.items()}


def _scales_of(name: str, parts: Sequence[Any], quantization: Quantization) -> LinearScales:
    stored = STORED[quantization]
    inputs = [part.input_quantizer for part in parts if part.input_quantizer.is_enabled]
    activation = _share(name, inputs) if inputs else None
    weights = [part.weight_quantizer for part in parts]
    if weights[0].axis is None:
        weight = _share(name, weights)
    else:
        weight = torch.cat([_greatest(name, quantizer).flatten() for quantizer in weights])
    return LinearScales(stored, _scale(weight, stored), None if activation is None else _scale(activation, stored))


def _share(name: str, quantizers: Sequence[Any]) -> Tensor:
    """Make all `quantizers` use the greatest value of any; [] float32."""
    shared = torch.stack([_greatest(name, quantizer) for quantizer in quantizers]).max()
    for quantizer in quantizers:
        quantizer.amax = shared
    return shared


def _greatest(name: str, quantizer: Any) -> Tensor:
    value = quantizer.amax
    if value is None:
        raise ValueError(f"calibration did not reach {name}: more draft steps are needed")
    return value.detach().float().clone()


def _scale(value: Tensor, dtype: torch.dtype) -> Tensor:
    return (value / largest(dtype)).clamp(min=_SMALLEST)
