"""The few names of TensorRT-LLM that the model class uses, on torch tensors.

Behaviour is that of ``tensorrt_llm/functional.py``, ``layers/linear.py`` and ``models/eagle/model.py`` where the model
class depends on it; networks and plugins are computed at once instead of being built.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


class NetworkTensor(Tensor):
    """A tensor of a network, which knows its value; so do all computed from it."""

    @property
    def trt_tensor(self) -> Tensor:
        return self


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(values).as_subclass(NetworkTensor)


class Parameter:
    """Once its `value` was used in a network, its raw value is gone."""

    def __init__(self, values: np.ndarray) -> None:
        self.dtype = values.dtype
        self._values: np.ndarray | Tensor = values

    @property
    def raw_value(self) -> np.ndarray:
        assert isinstance(self._values, np.ndarray), "get parameter.raw_value before getting parameter.value"
        return self._values

    @property
    def value(self) -> Tensor:
        if isinstance(self._values, np.ndarray):
            self._values = tensor(self._values)
        return self._values


class Linear:
    """A layer that adds its bias after the multiplication; `ranks` > 1 stands for the sum over ranks."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None = None, ranks: int = 1) -> None:
        self.weight = Parameter(weight)
        self.bias = None if bias is None else Parameter(bias)
        self.ranks = ranks

    def register_parameter(self, name: str, value: None) -> None:
        setattr(self, name, value)

    def forward(
        self, x: Tensor, lora_runtime_params: Any = None, lora_hidden_state: Any = None, **kwargs: Any
    ) -> Tensor:
        return self.collect_and_bias(x @ self.weight.value.T, **kwargs)

    def collect_and_bias(self, x: Tensor, all_reduce_params: Any = None) -> Tensor:
        x = x * self.ranks
        return x if self.bias is None else x + self.bias.value


class RmsNorm:
    """Its `weight.value` is read by its layer even where its `forward` is another."""

    def __init__(self, weight: np.ndarray, eps: float) -> None:
        self.weight, self.eps, self.normalized_shape = Parameter(weight), eps, weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, eps=self.eps) * self.weight.value


def rms_norm(x: Tensor, normalized_shape: Any, *, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    assert index.dim() == 1
    return x.index_select(dim, index)


class EagleForCausalLM:
    """Hands out what the base class would: rows of hidden states, chosen by the plugin's `indices`."""

    def __init__(self, config: Any, eagle_nets: list[Any], indices: list[Tensor]) -> None:
        self.config, self.eagle_nets, self.indices = config, eagle_nets, indices

    def _slice_hidden_states(self, hidden_states: Tensor, indices: Tensor) -> Tensor:
        return index_select(hidden_states, 0, indices)

    def _prepare_drafter_inputs(self, layer_idx: int, **inputs: Any) -> tuple[dict[str, Tensor], None, None]:
        chosen = self._slice_hidden_states(inputs["hidden_states"], self.indices[layer_idx])
        return {"hidden_states": chosen}, None, None


def add_step_linear(
    network: Any, x: Tensor, weights: Tensor, module_of_token: Tensor, compute_capability: int, bias: Tensor | None
) -> Tensor:
    assert compute_capability == 89 and module_of_token.dtype == torch.int32
    y = (weights[module_of_token] @ x[:, :, None])[..., 0]
    return y if bias is None else y + bias[module_of_token]


@contextmanager
def tensorrt_llm_shim() -> Iterator[None]:
    """Let ``tensorrt_llm`` and ``plugins.qdp`` be importable, with the names above."""
    names: dict[str, dict[str, Any]] = {
        "tensorrt_llm": {},
        "tensorrt_llm._common": {
            "default_trtnet": lambda: SimpleNamespace(num_layers=1, get_layer=lambda number: f"layer {number}")
        },
        "tensorrt_llm._utils": {"get_sm_version": lambda: 89},
        "tensorrt_llm.functional": {
            "_create_tensor": lambda value, layer: value,
            "cast": lambda value, dtype: value.to(getattr(torch, dtype)),
            "concat": lambda scalars: torch.stack(scalars),
            "constant": lambda values, dtype: tensor(values.astype(dtype)),
            "index_select": index_select,
            "rms_norm": rms_norm,
            "shape": lambda value, dim: tensor(value.shape[dim]),
        },
        "tensorrt_llm.models": {},
        "tensorrt_llm.models.eagle": {},
        "tensorrt_llm.models.eagle.model": {"EagleForCausalLM": EagleForCausalLM},
        "plugins.qdp": {"add_step_linear": add_step_linear},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        for name, members in names.items():
            module = ModuleType(name)
            vars(module).update(members)
            patch.setitem(sys.modules, name, module)
        yield
