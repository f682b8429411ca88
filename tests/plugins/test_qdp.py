"""What the plugins tell TensorRT: NVIDIA's own `tensorrt.plugin` package drives them, on a shim of `tensorrt`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from plugins import pool_attention as pool
from plugins import step_linear as linear
from prism_trt.errors import PrismError
from tests.plugins.tensorrt_shim import DataType, ITensor, Layer, Network, tensorrt_shim

MAX_TOKENS = 64


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def trt() -> Iterator[SimpleNamespace]:
    """`plugins.qdp` as registered with the shim, and the shim."""
    with tensorrt_shim() as shim:
        yield SimpleNamespace(qdp=importlib.import_module("plugins.qdp"), shim=shim)


def linear_inputs(max_tokens: int, dtype: Any = DataType.HALF, weight_type: Any = DataType.HALF) -> dict[str, ITensor]:
    return {
        "x": ITensor("x", dtype, ((1, min(8, max_tokens), max_tokens), 256)),
        "weights": ITensor("weights", weight_type, (3, 100, 256)),
        "module_of_token": ITensor("module_of_token", DataType.INT32, ((1, min(8, max_tokens), max_tokens),)),
    }


def evaluate(layer: Layer, sizes: dict[str, int]) -> tuple[list[int], list[int]]:
    """Grid and extra arguments for dynamic dimensions of `sizes`."""
    grid = [layer.launch[f"grid_{axis}"].value(sizes) for axis in "xyz"]
    return grid, [extra.expr.value(sizes) for extra in layer.extras]


def parameters(layer: Layer) -> list[str]:
    """Types of the parameters of the kernel's entry point."""
    ptx = layer.kernel.decode()
    entry = re.search(rf"\.entry {layer.kernel_name}\((.*?)\)", ptx, re.DOTALL)
    assert entry is not None
    return re.findall(r"\.param \.(\w+)", entry[1])


@pytest.mark.parametrize(
    ("dtype", "weight_type", "scaled"),
    [("HALF", "HALF", False), ("BF16", "BF16", False), ("HALF", "FP8", True), ("BF16", "FP8", True)],
)
def test_step_linear(trt: SimpleNamespace, tmp_path: Path, dtype: str, weight_type: str, scaled: bool) -> None:
    inputs = linear_inputs(MAX_TOKENS, DataType[dtype], DataType[weight_type])
    scales = ITensor("scales", DataType.FLOAT, (3,)) if scaled else None
    bias = ITensor("bias", DataType[dtype], (3, 100))
    network = Network()
    trt.qdp.add_step_linear(network, **inputs, compute_capability=89, kernels=tmp_path, scales=scales, bias=bias)
    layer = network.layer

    stand_in = "FLOAT" if scaled else dtype
    types = [dtype, weight_type, stand_in, dtype, "INT32", dtype]
    # One combination, the network's own types, once for every tactic.
    assert [one.name for one in layer.supported_types] == types
    assert layer.output_types == [DataType[dtype]] and layer.aliased_inputs == [-1]
    assert sorted(layer.tactics) == linear.tactics_for(MAX_TOKENS)
    tiles = linear.TACTICS[layer.tactics[0]]
    for tokens in (1, 13, 64):
        sizes = {"x.0": tokens}
        assert [dimension.value(sizes) for dimension in layer.output_shapes[0]] == [tokens, 100]
        grid, extras = evaluate(layer, sizes)
        assert grid == [-(-tokens // tiles.tokens), -(-100 // tiles.outputs), 3]
        assert extras == [tokens]
    assert all(extra.dtype is trt.shim.PluginArgDataType.INT32 for extra in layer.extras)
    assert layer.launch["block_x"].value({}) == 32 * tiles.num_warps
    # Inputs, int32, output, and the two scratch pointers that Triton adds and TensorRT passes as null.
    assert parameters(layer) == ["u64"] * 5 + ["u32"] + ["u64"] + ["u64"] * 2
    assert b".version 8.4" in layer.kernel and b".target sm_89" in layer.kernel


def test_step_linear_tactics_follow_the_largest_call(trt: SimpleNamespace, tmp_path: Path) -> None:
    for max_tokens, tile in ((1, 16), (16, 16), (17, 32), (64, 64), (500, 64)):
        network = Network()
        trt.qdp.add_step_linear(network, **linear_inputs(max_tokens), compute_capability=80, kernels=tmp_path)
        assert {linear.TACTICS[number].tokens for number in network.layer.tactics} == {tile}


def test_pool_attention(trt: SimpleNamespace, tmp_path: Path) -> None:
    rows, tokens, width = (1, 2, 8), (1, 10, 64), (1, 20, 128)
    half, int32 = DataType.HALF, DataType.INT32
    inputs = {
        "q": ITensor("q", half, (rows, tokens, 8, 64)),
        "k": ITensor("k", half, (rows, tokens, 2, 64)),
        "v": ITensor("v", half, (rows, tokens, 2, 64)),
        "k_pool": ITensor("k_pool", half, (4, 2, 512, 64)),
        "v_pool": ITensor("v_pool", half, (4, 2, 512, 64)),
        "slots": ITensor("slots", int32, (rows,)),
        "lengths": ITensor("lengths", int32, (rows,)),
        "mask": ITensor("mask", DataType.BOOL, (rows, tokens, width)),
    }
    network = Network()
    assert trt.qdp.add_pool_attention(network, **inputs, compute_capability=80, kernels=tmp_path) == (0, 1, 2)
    layer = network.layer
    assert [one.name for one in layer.supported_types] == ["HALF"] * 5 + ["INT32"] * 2 + ["BOOL"] + ["HALF"] * 3
    assert layer.aliased_inputs == [-1, list(inputs).index("k_pool"), list(inputs).index("v_pool")]
    sizes = {"q.0": 3, "q.1": 10, "mask.2": 25}
    shapes = [[dimension.value(sizes) for dimension in shape] for shape in layer.output_shapes]
    assert shapes == [[3, 10, 8, 64], [4, 2, 512, 64], [4, 2, 512, 64]]
    tiles = pool.TACTICS[layer.tactics[0]]
    assert evaluate(layer, sizes) == ([-(-10 * 4 // tiles.rows), 2, 3], [10, 25])
    assert parameters(layer) == ["u64"] * 8 + ["u32"] * 2 + ["u64"] * 3 + ["u64"] * 2


def test_fp8_is_refused_before_compute_capability_89(trt: SimpleNamespace, tmp_path: Path) -> None:
    inputs = linear_inputs(8, weight_type=DataType.FP8)
    message = r"^FP8 weights need a GPU of compute capability 8\.9 or newer and this build is for 8\.0: build with fp16"
    with pytest.raises(PrismError, match=message):
        trt.qdp.add_step_linear(Network(), **inputs, compute_capability=80, kernels=tmp_path)


def test_the_shim_leaves_nothing_behind() -> None:
    before = {name for name in sys.modules if name.startswith("tensorrt")}
    held: dict[str, ModuleType] = {name: sys.modules[name] for name in before}
    with tensorrt_shim() as shim:
        assert sys.modules["tensorrt"] is shim
    assert {name: sys.modules[name] for name in sys.modules if name.startswith("tensorrt")} == held
