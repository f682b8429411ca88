"""The step network with plugins: what NVIDIA's `tensorrt.plugin` package is told when a real network is emitted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from plugins import pool_attention as pool
from plugins import step_linear as linear
from prism_trt.convert.drafter import emit_step
from prism_trt.convert.graph import Emitted
from prism_trt.convert.plugins import Plugins, compile_kernels
from tests.plugins.bindings import LEAST_USUAL_MOST, PluginBindings
from tests.plugins.tensorrt_shim import tensorrt_shim
from tests.tiny import tiny_drafter, tiny_target

CAPACITY, SLOTS = 80, 3
WIDTH = 64
MATRICES = {
    "fc": (2, WIDTH, 2 * WIDTH),
    "layers.0/attention/qkv": (2, 128, WIDTH),
    "layers.0/attention/o": (2, WIDTH, WIDTH),
    "layers.0/mlp/gate_up": (2, 192, WIDTH),
    "layers.0/mlp/down": (2, WIDTH, 96),
}
"""Of the tiny drafter, by layer name."""


def emit(trt: Any, plugins: Plugins) -> Emitted:
    target = tiny_target()
    drafter = tiny_drafter(target, modules=2, fc_bias=True)
    return emit_step(trt, drafter, target.model, CAPACITY, torch.float16, plugins=plugins)


def test_kernels_of_a_bundle_are_all_that_tensorrt_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels compiled beside a network with gaps, then the network with plugin layers, without a compiler."""
    rtx = pytest.importorskip("tensorrt_rtx_bindings")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    plugins = Plugins(SLOTS, 90, tmp_path / "kernels")
    gaps = emit(rtx, plugins)
    largest = LEAST_USUAL_MOST[-1] ** 2
    compile_kernels(gaps, largest, plugins)
    monkeypatch.setattr(triton, "compile", lambda *_, **__: pytest.fail("a kernel was missing"))
    with tensorrt_shim() as shim:
        network = emit(PluginBindings(rtx, shim), plugins).network

    *linears, attention = sorted(network.layers, key=lambda layer: len(layer.outputs))
    assert {layer.name: layer.inputs[1].shape for layer in linears} == {
        f"step/{name}": shape for name, shape in MATRICES.items()
    }
    assert attention.name == "step/layers.0/attention/attend"
    for layer in linears:
        assert {linear.TACTICS[number].tokens for number in layer.tactics[0].tactics} == {64}
    assert layer.tactics[0].tactics and attention.tactics[0].aliased_inputs == [-1, 3, 4]
    assert [tensor.shape for tensor in attention.inputs[3:5]] == [(SLOTS, 2, CAPACITY, 16)] * 2
    assert sorted(attention.tactics[0].tactics) == pool.tactics_for(largest)
    kernels = [built for layer in network.layers for built in layer.tactics]
    assert {re.search(rb"\.target (\w+)", built.kernel)[1] for built in kernels} == {b"sm_90a"}  # type: ignore[index]
    # What the gaps declare is what the plugins give.
    outputs = {layer.name: layer.outputs[0] for layer in network.layers}
    assert {layer.name: (layer.output.dtype, tuple(layer.output.shape)) for layer in gaps.plugins} == {
        name: (value.dtype, tuple(value.shape)) for name, value in outputs.items()
    }
    names = {network.get_output(number).name for number in range(network.num_outputs)}
    assert names == {"next_hidden", "logits", "keys.0.updated", "values.0.updated"}


def test_weights_have_no_other_reader(tmp_path: Path) -> None:
    """Every matrix of the modules goes into one plugin layer and nowhere else, so that nothing copies it."""
    rtx = pytest.importorskip("tensorrt_rtx_bindings")
    emitted = emit(rtx, Plugins(SLOTS, 90, tmp_path))
    network = emitted.network
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    read = {value.name for layer in layers for i in range(layer.num_inputs) if (value := layer.get_input(i))}
    matrices = {
        layer.get_output(0).name: tuple(layer.get_output(0).shape)
        for layer in layers
        if layer.name.startswith("modules.") and len(layer.get_output(0).shape) == 3
    }
    assert sorted(matrices.values()) == sorted(MATRICES.values())
    assert not matrices.keys() & read
    in_place = [layer.inputs["weights"].name for layer in emitted.plugins if layer.plugin == "step_linear"]
    assert sorted(in_place) == sorted(matrices)
