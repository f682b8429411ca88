"""On an NVIDIA GPU (``python -m pytest -m gpu tests/plugins``): the kernels, and an engine that holds them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from plugins.pool_attention import pool_attention
from plugins.step_linear import FP8_CAPABILITY, step_linear
from prism_trt.build import build_engine
from prism_trt.drafter.checkpoint import save_drafter
from prism_trt.engines.loading import load_engine
from prism_trt.engines.protocol import Engine, EngineLimits, TokenBatch
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.target.loading import save_hf
from tests.plugins.cases import (
    AttentionCase,
    LinearCase,
    assert_close,
    attention_cases,
    expected_attention,
    expected_linear,
    linear_cases,
    on,
)
from tests.tiny import tiny_drafter, tiny_target

pytestmark = pytest.mark.gpu


def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@pytest.mark.parametrize("case", linear_cases(), ids=lambda case: case.name)
def test_step_linear_equals_the_float64_reference(case: LinearCase) -> None:
    arguments = case.arguments()
    if case.fp8 and capability() < FP8_CAPABILITY:
        arguments["weights"] = arguments["weights"].to(arguments["x"].dtype)
    actual = step_linear(**on("cuda", arguments))
    assert_close(actual, expected_linear(**arguments), case.dtype)


@pytest.mark.parametrize("case", attention_cases(), ids=lambda case: case.name)
def test_pool_attention_equals_the_float64_reference(case: AttentionCase) -> None:
    arguments = case.arguments()
    expected, k_pool, v_pool = expected_attention(**arguments)
    device = on("cuda", arguments)
    assert_close(pool_attention(**device), expected, case.dtype)
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        assert torch.equal(device[name].cpu().view(torch.int16), pool.view(torch.int16))


def test_an_engine_with_both_plugins_equals_the_references(tmp_path: Path) -> None:
    """Linear layer and attention in one TensorRT engine, its pools updated in place, at two numbers of tokens."""
    trt = importlib.import_module("tensorrt")
    qdp = importlib.import_module("plugins.qdp")
    modules, heads, kv_heads, width, slots, capacity = 2, 4, 2, 64, 3, 128
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    types = {torch.float16: trt.float16, torch.int32: trt.int32, torch.bool: trt.bool}

    def arguments(batch: int, tokens: int, earlier: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(tokens)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).half()

        mask = torch.ones(batch, tokens, earlier + tokens, dtype=torch.bool).tril(earlier)
        return {
            "x": normal(batch * tokens, 96),
            "weights": normal(modules, heads * width, 96) / 8,
            "module_of_token": torch.randint(0, modules, (batch * tokens,), generator=generator).int(),
            "k": normal(batch, tokens, kv_heads, width),
            "v": normal(batch, tokens, kv_heads, width),
            "k_pool": normal(slots, kv_heads, capacity, width),
            "v_pool": normal(slots, kv_heads, capacity, width),
            "slots": torch.arange(batch).int() + 1,
            "lengths": torch.arange(batch).int() + 40,
            "mask": mask,
        }

    dynamic = {
        "x": (-1, 96),
        "module_of_token": (-1,),
        "k": (-1, -1, kv_heads, width),
        "v": (-1, -1, kv_heads, width),
        "slots": (-1,),
        "lengths": (-1,),
        "mask": (-1, -1, -1),
    }
    largest = arguments(2, 16, 16)
    tensors = {
        name: network.add_input(name, types[value.dtype], dynamic.get(name, tuple(value.shape)))
        for name, value in largest.items()
    }
    y = qdp.add_step_linear(
        network, tensors["x"], tensors["weights"], tensors["module_of_token"], capability(), kernels=tmp_path
    )
    shuffle = network.add_shuffle(y)
    batch_and_tokens = network.add_slice(network.add_shape(tensors["k"]).get_output(0), (0,), (2,), (1,)).get_output(0)
    widths = torch.tensor([heads, width], dtype=torch.int64).numpy()
    shape = network.add_concatenation([batch_and_tokens, network.add_constant((2,), widths).get_output(0)])
    shuffle.set_input(1, shape.get_output(0))
    q = shuffle.get_output(0)
    names = ("k", "v", "k_pool", "v_pool", "slots", "lengths", "mask")
    outputs = qdp.add_pool_attention(
        network, q, **{name: tensors[name] for name in names}, compute_capability=capability(), kernels=tmp_path
    )
    for name, output in zip(("y", "k_pool_out", "v_pool_out"), outputs, strict=True):
        output.name = name
        network.mark_output(output)

    config = builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    profile = builder.create_optimization_profile()
    smallest, usual = arguments(1, 1, 0), arguments(2, 10, 10)
    for name in dynamic:
        profile.set_shape(name, *(tuple(of[name].shape) for of in (smallest, usual, largest)))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    for given in (usual, smallest):
        device: dict[str, Any] = on("cuda", given)
        batch, tokens = given["k"].shape[:2]
        device["y"] = torch.empty(batch, tokens, heads, width, dtype=torch.float16, device="cuda")
        for name, value in device.items():
            if name in given:
                context.set_input_shape(name, tuple(value.shape))
            context.set_tensor_address(name, value.data_ptr())
        for name in ("k_pool", "v_pool"):
            context.set_tensor_address(f"{name}_out", device[name].data_ptr())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        assert context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        linear = expected_linear(given["x"], given["weights"], given["module_of_token"], None, None, None)
        q_reference = linear.half().unflatten(0, (batch, tokens)).unflatten(-1, (heads, width))
        expected, k_pool, v_pool = expected_attention(q_reference, **{name: given[name] for name in names}, tactic=None)
        torch.testing.assert_close(device["y"].cpu().double(), expected, rtol=0, atol=1e-2)
        assert torch.equal(device["k_pool"].cpu(), k_pool) and torch.equal(device["v_pool"].cpu(), v_pool)


def test_a_built_step_network_drafts_as_pytorch(tmp_path: Path) -> None:
    """The step network with plugins, built by TensorRT and run by the engine, against torch in float32."""
    pytest.importorskip("tensorrt")
    target = tiny_target(hidden_size=128, head_dim=64)
    drafter = tiny_drafter(target)
    save_hf(target, tmp_path / "target")
    save_drafter(drafter, tmp_path / "drafter")
    profile = {80: "a100", 89: "rtx4090", 90: "h800"}[capability()]
    models: dict[str, Any] = {"target": tmp_path / "target", "drafter": tmp_path / "drafter"}
    build_engine(profile=profile, runtime="tensorrt", **models, out=tmp_path / "engine", context=96, slots=2)
    tokens = torch.randint(0, 320, (8,), generator=torch.Generator().manual_seed(0))

    def logits(engine: Engine) -> list[torch.Tensor]:
        batch = TokenBatch.one_row(tokens.to(engine.device), 0)
        first = engine.extend(batch, engine.forward(batch).features)
        second = engine.step(1, TokenBatch.one_row(tokens[:1].to(engine.device), 8), first.hidden)
        return [first.logits.cpu().clone(), second.logits.cpu().clone()]

    exact = TorchEngine(target, drafter, EngineLimits(2, 96, 96), torch.device("cpu"), torch.float32)
    for found, expected in zip(logits(load_engine(tmp_path / "engine")), logits(exact), strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()
