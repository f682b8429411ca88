"""The EAGLE model of TensorRT-LLM 1.2 with each tree token's K/V from its own module: for ``--model_cls_file``.

Written against the sources of ``EagleForCausalLM`` and its layers, and never run: TensorRT-LLM needs a GPU host. What
it computes is that of the base class, but for the linear layers and the norm inside the EagleNets of steps 1, 2, ...:
they take every token's weights from the module of its depth (see `prism_trt.trtllm.selection`), which the plugin
``prism::step_linear`` finds in one stack for all steps. EagleNet 0 is left as it is: all its tokens belong to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from tensorrt_llm._common import default_trtnet  # type: ignore[import-not-found]
from tensorrt_llm._utils import get_sm_version  # type: ignore[import-not-found]
from tensorrt_llm.functional import (  # type: ignore[import-not-found]
    _create_tensor,
    cast,
    concat,
    constant,
    index_select,
    rms_norm,
    shape,
)
from tensorrt_llm.models.eagle.model import EagleForCausalLM  # type: ignore[import-not-found]

from prism_trt.errors import PrismError
from prism_trt.resources import resource
from prism_trt.trtllm.selection import ModuleStack, entries_of_tokens

sys.path.append(str(resource("plugins").parent))  # beside the package in a checkout, inside it when installed
from plugins.qdp import add_step_linear


class PrismForCausalLM(EagleForCausalLM):
    """`EagleForCausalLM` whose tree tokens are processed by the module of their depth."""

    def _slice_hidden_states(self, hidden_states: Any, indices: Any) -> Any:
        self._rows = indices  # the base class does not hand them on
        return super()._slice_hidden_states(hidden_states, indices)

    def _prepare_drafter_inputs(self, layer_idx: int, **inputs: Any) -> Any:
        prepared = super()._prepare_drafter_inputs(layer_idx, **inputs)
        if layer_idx > 0:
            self._select_modules(layer_idx, inputs["hidden_size_batch_level_starts"], inputs["next_draft_lens"])
        return prepared

    def _select_modules(self, step: int, level_starts: Any, draft_lens: Any) -> None:
        """Make EagleNet `step` take each token's weights from the module of its depth.

        Args:
            level_starts: [batch * steps + 1] first row of each step's and request's hidden states.
            draft_lens: [batch].
        """
        stack = ModuleStack.of(tuple(self.config.prism_step_map))
        if step == 1:  # before any of these nets makes its weights part of the network
            nets = [_Net(self.eagle_nets[source].drafter) for source in stack.steps]
            self._weights = [_stacked([net.linears[i].weight for net in nets]) for i in range(len(nets[0].linears))]
            self._biases = _stacked([net.linears[0].bias for net in nets])
            self._norms = _stacked([net.norm.weight for net in nets])
        batch = shape(draft_lens, 0)
        starts = [index_select(level_starts, 0, concat([batch * level])) for level in range(1, step)]
        entries = entries_of_tokens(self._rows, starts, stack.entries[:step], lambda flags: cast(flags, "int32"))

        net = _Net(self.eagle_nets[step].drafter)
        net.linears[0].register_parameter("bias", None)  # the plugin adds the token's own
        for number, (linear, weights) in enumerate(zip(net.linears, self._weights, strict=True)):
            linear.forward = _step_linear(linear, weights, entries, None if number else self._biases)
        net.norm.forward = _step_norm(net.norm, self._norms, entries)


class _Net:
    """The layers of an EagleNet's drafter that differ between modules; the first linear one has a bias."""

    def __init__(self, drafter: Any) -> None:
        layer = drafter.layers[0]
        attention, mlp = layer.attention, layer.mlp
        if hasattr(mlp, "fused_fc"):
            raise PrismError("trtllm-build has fused the MLPs of the EagleNets: pass --use_fused_mlp disable")
        self.linears = (drafter.fc, attention.qkv, attention.dense, mlp.fc, mlp.gate, mlp.proj)
        self.norm = layer.post_layernorm


def _stacked(parameters: list[Any]) -> Any:
    """A constant [M, ...] of the values of parameters [...]."""
    return constant(np.stack([parameter.raw_value for parameter in parameters]), parameters[0].dtype)


def _step_linear(linear: Any, weights: Any, entries: Any, biases: Any) -> Callable[..., Any]:
    """The forward of `linear`, with the weights and biases of each token's entry."""

    def forward(x: Any, lora_runtime_params: Any = None, lora_hidden_state: Any = None, **collect: Any) -> Any:
        network = default_trtnet()
        bias = None if biases is None else biases.trt_tensor
        y = add_step_linear(network, x.trt_tensor, weights.trt_tensor, entries.trt_tensor, get_sm_version(), bias=bias)
        # Where several ranks share the layer, this gathers or adds up their results.
        return linear.collect_and_bias(_create_tensor(y, network.get_layer(network.num_layers - 1)), **collect)

    return forward


def _step_norm(norm: Any, weights: Any, entries: Any) -> Callable[[Any], Any]:
    """The forward of `norm`, with the weights of each token's entry."""
    return lambda x: rms_norm(x, norm.normalized_shape, eps=norm.eps) * index_select(weights, 0, entries)
