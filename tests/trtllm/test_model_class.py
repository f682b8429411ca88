"""The model class, loaded as ``trtllm-build`` does, on a stand-in for TensorRT-LLM."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import prism_trt.trtllm
from prism_trt.errors import PrismError
from tests.trtllm.tensorrt_llm_shim import Linear, RmsNorm, tensor, tensorrt_llm_shim

WIDTH, OUT, EPS = 6, 8, 1e-5
STEP_MAP = (0, 1, 2, 1)
# Two requests, at most two parents per depth, as ``prepareGenEagleNetInputsKernel`` numbers hidden states: those of
# step 0 are rows 0 and 1, of step 1 rows 2, 3 and 4, 5, of step 2 rows 6, 7 and 8, 9.
STARTS = [0, 1, 2, 4, 6, 8, 10, 0, 0]
ROWS = [0, 0, 2, 3, 6, 1, 4, 8]
DEPTHS = [1, 1, 2, 2, 3, 1, 2, 3]


@pytest.fixture(scope="module")
def file() -> Iterator[ModuleType]:
    path = Path(prism_trt.trtllm.__file__).with_name("model_class.py")
    spec = spec_from_file_location("models", path)
    assert spec is not None and spec.loader is not None
    with tensorrt_llm_shim():
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def make_net(seed: int) -> Any:
    """An EagleNet's drafter; its weights are those of module `seed`."""
    generator = np.random.default_rng(seed)

    def linear(ranks: int = 1) -> Linear:
        return Linear(generator.normal(size=(OUT, WIDTH)).astype(np.float32), ranks=ranks)

    layer = SimpleNamespace(
        attention=SimpleNamespace(qkv=linear(), dense=linear(ranks=2)),
        mlp=SimpleNamespace(fc=linear(), gate=linear(), proj=linear(ranks=2)),
        post_layernorm=RmsNorm(generator.normal(size=WIDTH).astype(np.float32), EPS),
    )
    fc = Linear(linear().weight.raw_value, generator.normal(size=OUT).astype(np.float32))
    return SimpleNamespace(drafter=SimpleNamespace(fc=fc, layers=[layer]))


def layers_of(net: Any) -> list[Any]:
    layer = net.drafter.layers[0]
    attention, mlp = layer.attention, layer.mlp
    return [net.drafter.fc, attention.qkv, attention.dense, mlp.fc, mlp.gate, mlp.proj, layer.post_layernorm]


def make_model(file: ModuleType) -> Any:
    config = SimpleNamespace(prism_step_map=list(STEP_MAP))
    rows = torch.tensor(ROWS, dtype=torch.int32)
    depths = torch.tensor(DEPTHS)
    indices = [tensor([0]), *(tensor(rows[depths <= step]) for step in range(1, 4))]
    return file.PrismForCausalLM(config, [make_net(module) for module in STEP_MAP], indices)


def test_every_layer_takes_each_tokens_weights_from_the_module_of_its_depth(file: ModuleType) -> None:
    model = make_model(file)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        inputs, _, _ = model._prepare_drafter_inputs(
            layer_idx=step,
            hidden_states=tensor(torch.randn(12, WIDTH, generator=generator)),
            hidden_size_batch_level_starts=tensor(torch.tensor(STARTS, dtype=torch.int32)),
            next_draft_lens=tensor([0, 0]),
        )
        x = inputs["hidden_states"]
        modules = [STEP_MAP[depth] for depth in DEPTHS if depth <= step] or [0]
        expected_layers = [layers_of(make_net(module)) for module in modules]
        for number, layer in enumerate(layers_of(model.eagle_nets[step])):
            found = layer.forward(x)
            expected = [layers[number].forward(row[None])[0] for layers, row in zip(expected_layers, x, strict=True)]
            torch.testing.assert_close(found, torch.stack(expected))
        layers_of(model.eagle_nets[step])[-1].weight.value.sum()  # its layer reads the norm's own weight too


def test_fused_mlps_are_refused(file: ModuleType) -> None:
    model = make_model(file)
    model.eagle_nets[1].drafter.layers[0].mlp.fused_fc = None
    starts, lens = tensor(torch.tensor(STARTS, dtype=torch.int32)), tensor([0, 0])
    with pytest.raises(PrismError, match="--use_fused_mlp disable"):
        model._prepare_drafter_inputs(
            layer_idx=1,
            hidden_states=tensor(torch.zeros(12, WIDTH)),
            hidden_size_batch_level_starts=starts,
            next_draft_lens=lens,
        )
