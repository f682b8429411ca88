"""Tensors of a TensorRT-LLM checkpoint: their names, and each rank's share of them.

Sources: ``tensorrt_llm/models/eagle/model.py``, ``models/llama/model.py`` and ``layers`` of TensorRT-LLM's 1.2 line. A
matrix is stored [out, in]. Column-parallel ones (qkv, mlp.fc, mlp.gate, fc, lm_head) give each rank a part of their
rows, row-parallel ones (dense, mlp.proj) a part of their columns; embedding and norms are whole on every rank. What
Hugging Face calls gate_proj is ``mlp.fc``, and its up_proj is ``mlp.gate``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from prism_trt.config import StrictModel, TreeShape
from prism_trt.drafter.model import Drafter, DrafterLayer
from prism_trt.errors import PrismError
from prism_trt.target.loading import Target
from prism_trt.target.model import DecoderLayer

FP8 = torch.float8_e4m3fn
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class CheckpointOptions(StrictModel):
    """What a checkpoint is written for."""

    tree: TreeShape = Field(TreeShape(), description="deepest and widest tree that the engine will draft and verify")
    dtype: Literal["float16", "bfloat16"] = "float16"
    ranks: Literal[1, 2] = Field(1, description="GPUs that share every matrix (tensor parallelism)")


class LinearScales(StrictModel):
    """FP8 scales of one linear layer: a stored value times its scale is the value that is meant."""

    weight: float = Field(gt=0)
    activation: float = Field(gt=0)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a rank's file, computed when it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    compute: Callable[[], Tensor]


def padded_vocab(vocab_size: int, ranks: int) -> int:
    """Rows of the heads, which each rank must have equally many of."""
    return -(-vocab_size // ranks) * ranks


def linear_names(num_layers: int, depth: int) -> tuple[set[str], set[str]]:
    """Names of the linear layers that FP8 scales can be for: the target's, and those of the EagleNets."""
    parts = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
    target = {f"transformer.layers.{layer}.{part}" for layer in range(num_layers) for part in parts}
    nets = {f"{_net(step)}.{part}" for step in range(depth) for part in ("fc", *(f"layers.0.{part}" for part in parts))}
    return target, nets


def rank_tensors(
    target: Target, drafter: Drafter, options: CheckpointOptions, rank: int, scales: Mapping[str, LinearScales]
) -> list[StoredTensor]:
    """Every tensor of the file of `rank`; EagleNet k holds the module of draft step k."""
    share = _Share(rank, options.ranks, DTYPES[options.dtype], scales)
    model = target.model
    embedding, head = model.model.embed_tokens.weight, model.head_weight
    tensors = [share.whole("transformer.vocab_embedding.weight", embedding), share.head("lm_head.weight", head)]
    for number, layer in enumerate(model.model.layers):
        assert isinstance(layer, DecoderLayer)
        name = f"transformer.layers.{number}"
        tensors.append(share.whole(f"{name}.input_layernorm.weight", layer.input_layernorm.weight))
        tensors.extend(share.layer(name, layer))
    tensors.append(share.whole("transformer.ln_f.weight", model.model.norm.weight))
    for step in range(options.tree.depth):
        module, name = drafter.module(step), _net(step)
        assert module.fc is not None
        # An EagleNet always has a bias.
        bias = torch.zeros(len(module.fc.weight)) if module.fc.bias is None else module.fc.bias
        tensors.append(share.whole(f"{name}.vocab_embedding.weight", embedding))
        tensors.extend(share.rows(f"{name}.fc", module.fc.weight))
        tensors.append(share.bias(f"{name}.fc.bias", bias))
        tensors.extend(share.layer(f"{name}.layers.0", module.stack[0]))
        tensors.append(share.head(f"eagle_nets.{step}.lm_head.weight", head))
    return tensors


def _net(step: int) -> str:
    return f"eagle_nets.{step}.drafter"


@dataclass(frozen=True)
class _Share:
    """What one rank stores."""

    rank: int
    ranks: int
    dtype: torch.dtype
    scales: Mapping[str, LinearScales]

    def layer(self, name: str, layer: DecoderLayer | DrafterLayer) -> Iterator[StoredTensor]:
        """A transformer layer, but for the norm in front of it."""
        attention, mlp = layer.self_attn, layer.mlp
        qkv = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        yield from self.rows(f"{name}.attention.qkv", *qkv)
        yield from self.columns(f"{name}.attention.dense", attention.o_proj.weight)
        yield from self.rows(f"{name}.mlp.fc", mlp.gate_proj.weight)
        yield from self.rows(f"{name}.mlp.gate", mlp.up_proj.weight)
        yield from self.columns(f"{name}.mlp.proj", mlp.down_proj.weight)
        yield self.whole(f"{name}.post_layernorm.weight", layer.post_attention_layernorm.weight)

    def rows(self, name: str, *matrices: Tensor) -> Iterator[StoredTensor]:
        """A linear layer of this rank's rows of each of `matrices`, one below the other."""
        shape = (sum(len(matrix) for matrix in matrices) // self.ranks, matrices[0].shape[1])
        return self._linear(name, shape, lambda: torch.cat([self._part(matrix, 0) for matrix in matrices]))

    def columns(self, name: str, matrix: Tensor) -> Iterator[StoredTensor]:
        """A linear layer of this rank's columns of `matrix`."""
        return self._linear(name, (len(matrix), matrix.shape[1] // self.ranks), lambda: self._part(matrix, 1))

    def bias(self, name: str, values: Tensor) -> StoredTensor:
        """This rank's part of a vector."""
        return self._converted(name, (len(values) // self.ranks,), lambda: self._part(values, 0))

    def head(self, name: str, matrix: Tensor) -> StoredTensor:
        """This rank's rows of a head, filled up with zeros."""
        rows = padded_vocab(len(matrix), self.ranks)
        filled = (0, 0, 0, rows - len(matrix))
        shape = (rows // self.ranks, matrix.shape[1])
        return self._converted(name, shape, lambda: self._part(functional.pad(matrix, filled), 0))

    def whole(self, name: str, tensor: Tensor) -> StoredTensor:
        """A tensor that every rank has."""
        return self._converted(name, tuple(tensor.shape), lambda: tensor)

    def _part(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.chunk(self.ranks, axis)[self.rank]

    def _converted(self, name: str, shape: tuple[int, ...], compute: Callable[[], Tensor]) -> StoredTensor:
        return StoredTensor(name, self.dtype, shape, lambda: _finite(name, compute().to(self.dtype)))

    def _linear(self, name: str, shape: tuple[int, ...], compute: Callable[[], Tensor]) -> Iterator[StoredTensor]:
        scales = self.scales.get(name)
        if scales is None:
            yield self._converted(f"{name}.weight", shape, compute)
            return
        weight = scales.weight
        yield StoredTensor(f"{name}.weight", FP8, shape, lambda: _to_fp8(compute(), weight))
        yield _scalar(f"{name}.weights_scaling_factor", weight)
        yield _scalar(f"{name}.activation_scaling_factor", scales.activation)


def _scalar(name: str, value: float) -> StoredTensor:
    return StoredTensor(name, torch.float32, (1,), lambda: torch.tensor([value]))


def _to_fp8(weight: Tensor, scale: float) -> Tensor:
    limit = torch.finfo(FP8).max
    return (weight.float() / scale).clamp(-limit, limit).to(FP8)


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise PrismError(f"{name} has values that are not finite in {tensor.dtype}: pass --dtype bfloat16")
    return tensor


def require_scales(scales: Mapping[str, LinearScales], num_layers: int, depth: int) -> None:
    """Check that FP8 scales are for all linear layers of the target, and for all of the EagleNets or none.

    Raises:
        PrismError: naming the first layer that lacks scales, or that does not exist.
    """
    target, nets = linear_names(num_layers, depth)
    wanted = target | nets if nets & scales.keys() else target
    if missing := sorted(wanted - scales.keys()):
        raise PrismError(
            f"{missing[0]} has no FP8 scales: give them for every linear layer of the target, and of the nets"
        )
    if unknown := sorted(scales.keys() - wanted):
        raise PrismError(
            f"there are FP8 scales for {unknown[0]}, which is no linear layer of this checkpoint: leave them out"
        )


def quantizes_nets(scales: Mapping[str, LinearScales]) -> bool:
    """Whether scales that `require_scales` accepts are for the EagleNets too."""
    return any(name.startswith("eagle_nets.") for name in scales)
