"""Quantised engines from a file of prompts to plans, and bundles that carry their scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prism_trt.build import build_engine
from prism_trt.build.builder import finish_bundle
from prism_trt.build.bundle import BundleManifest, bundled_quantization, read_bundle
from prism_trt.config import TreeShape
from prism_trt.drafter.checkpoint import save_drafter
from prism_trt.engines.manifest import read_engine_manifest
from prism_trt.errors import PrismError
from prism_trt.inspect.artifacts import inspect_path
from prism_trt.manifest import sha256_file
from prism_trt.quantize.scales import SCALES_FILE, Quantization
from prism_trt.target.loading import save_hf
from tests.tiny import tiny_drafter, tiny_target

pytest.importorskip("modelopt", reason="ModelOpt is missing: install the fp8 extra")
TREE = TreeShape.parse("8/3/3")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Tiny models whose heads are wide enough for TensorRT's fused attention, and prompts."""
    directory = tmp_path_factory.mktemp("models")
    target = tiny_target(hidden_size=128, intermediate_size=192, head_dim=64)
    save_hf(target, directory / "target")
    save_drafter(tiny_drafter(target), directory / "drafter")
    prompts = directory / "prompts.jsonl"
    questions = [f"The quick brown fox jumps over {number} lazy dogs." for number in range(8)]
    prompts.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    return directory / "target", directory / "drafter", prompts


@pytest.fixture(autouse=True)
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling the engine that answers the prompts would take longer than everything else."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


@pytest.mark.parametrize(("gpu", "quantization"), [("rtx4090", "fp8"), ("a100", "int8")])
def test_a_quantised_engine(
    models: tuple[Path, Path, Path], tmp_path: Path, gpu: str, quantization: Quantization
) -> None:
    target, drafter, prompts = models
    out, said = tmp_path / "engine", list[str]()
    build_engine(
        profile=gpu,
        target=target,
        drafter=drafter,
        out=out,
        tree=TREE,
        context=96,
        slots=2,
        quantization=quantization,
        calibration=prompts,
        say=said.append,
    )
    gpu_engine = read_engine_manifest(out).gpu
    assert gpu_engine is not None and gpu_engine.quantization is not None
    report = gpu_engine.quantization
    assert (report.quantization, report.calibration_sha256) == (quantization, sha256_file(prompts))
    assert (report.calibrated_prompts, report.measured_prompts) == (6, 2)
    assert said == [str(report)] and report.kl_divergence > 0
    products = {name: network.quantized_products for name, network in gpu_engine.networks.items()}
    # Four matrices a layer, and the fusion layer; the step network selects among modules of the network's own type.
    assert products == {"target": 2 * 4, "step": 0, "round": TREE.depth * 5 if quantization == "fp8" else 0}
    assert not gpu_engine.networks["round"].copied_weights
    names = {name.rpartition(".")[0] for name in load_file(out / SCALES_FILE)}
    drafted = {"modules.0.fc", "modules.1.layers.0.down"} if quantization == "fp8" else set()
    assert {"layers.1.qkv", *drafted} <= names and len(names) == 8 + (2 * 5 if drafted else 0)
    assert inspect_path(out).facts["quantisation"] == str(report)


def test_a_bundle_carries_the_scales(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    target, drafter, prompts = models
    out = tmp_path / "bundle"
    manifest = build_engine(
        profile="h800",
        target=target,
        drafter=drafter,
        out=out,
        context=96,
        slots=2,
        quantization="fp8",
        calibration=prompts,
        say=lambda _: None,
    )
    assert isinstance(manifest, BundleManifest)
    assert 0.01 < manifest.deviation["target"] < 0.4
    quantized = bundled_quantization(out, read_bundle(out))
    assert quantized is not None and quantized.report == manifest.quantization
    assert len(quantized.scales) == 8 + 2 * 5
    (out / SCALES_FILE).unlink()
    with pytest.raises(PrismError, match="is missing"):
        finish_bundle(out, tmp_path / "engine")


def test_refusals(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    target, drafter, prompts = models
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"prompt": "Why?"}) + "\n")
    for arguments, message in [
        (
            {"profile": "a100", "quantization": "fp8", "calibration": prompts},
            "a100 has no fp8: pass --int8, or neither",
        ),
        ({"profile": "cpu", "quantization": "int8", "calibration": prompts}, "cpu has no int8: leave it out"),
        ({"profile": "rtx4090", "quantization": "fp8"}, "--fp8 needs prompts"),
        ({"profile": "rtx4090", "calibration": prompts}, "--calibration is for quantised engines"),
        ({"profile": "rtx4090", "quantization": "fp8", "calibration": few}, "pass a file with more prompts"),
    ]:
        with pytest.raises(PrismError, match=message):
            build_engine(target=target, drafter=drafter, out=tmp_path / "engine", context=96, **arguments)  # type: ignore[arg-type]
        assert not (tmp_path / "engine").exists()
