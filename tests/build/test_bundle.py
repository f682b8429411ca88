"""Bundles: written here, and finished with TensorRT's builder replaced, because that needs the GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import triton

from prism_trt.build import build_engine
from prism_trt.build.builder import finish_bundle
from prism_trt.build.bundle import BundleManifest
from prism_trt.convert.graph import Emitted
from prism_trt.drafter.checkpoint import save_drafter
from prism_trt.engines.manifest import read_engine_manifest
from prism_trt.engines.tensorrt.files import KERNELS
from prism_trt.errors import PrismError
from prism_trt.inspect.artifacts import inspect_path
from prism_trt.target.loading import save_hf
from tests.plugins.bindings import PluginBindings
from tests.plugins.tensorrt_shim import tensorrt_shim
from tests.tiny import tiny_drafter, tiny_target

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is missing: install the test extra")


def contents(kernels: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in kernels.iterdir()}


def test_a_bundle_is_finished_with_the_kernels_it_carries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    target = tiny_target()
    save_hf(target, tmp_path / "target")
    save_drafter(tiny_drafter(target), tmp_path / "drafter")
    bundle, out = tmp_path / "bundle", tmp_path / "engine"
    models: dict[str, Any] = {"target": tmp_path / "target", "drafter": tmp_path / "drafter"}
    manifest = build_engine(profile="a100", runtime="tensorrt", **models, out=bundle, context=96, slots=2)
    assert isinstance(manifest, BundleManifest)
    kernels = contents(bundle / KERNELS)
    assert {re.search(rb"\.target (\w+)", kernel)[1] for kernel in kernels.values()} == {b"sm_80"}  # type: ignore[index]
    report = inspect_path(bundle)
    assert (report.kind, report.sound) == ("engine bundle", True)
    assert report.facts["compiled plugins"] == str(len(kernels))

    emitted: dict[str, Emitted] = {}

    def compile_network(network: Emitted, profile: Any, plan: Path, *_: Any) -> str:
        emitted[plan.stem] = network
        plan.write_bytes(b"plan")
        return ""

    monkeypatch.setattr(triton, "compile", lambda *_, **__: pytest.fail("a kernel was compiled"))
    monkeypatch.setattr("prism_trt.build.builder.compiles_here", lambda settings: settings.runtime == "tensorrt")
    monkeypatch.setattr("prism_trt.build.gpu.compile_network", compile_network)
    with tensorrt_shim() as shim:
        monkeypatch.setattr("prism_trt.build.gpu.import_tensorrt", lambda runtime: PluginBindings(rtx, shim))
        finish_bundle(bundle, out)
    engine = read_engine_manifest(out)
    assert (engine.runtime, engine.profile) == ("tensorrt", "a100")
    assert contents(out / KERNELS) == kernels
    plugins = [layer.plugin for layer in emitted["step"].plugins]
    assert sorted(plugins) == ["pool_attention"] + 5 * ["step_linear"]
    assert not emitted["target"].plugins and not emitted["round"].plugins

    next((bundle / KERNELS).iterdir()).write_bytes(b"")
    assert not inspect_path(bundle).sound
    with pytest.raises(PrismError, match="bytes instead of"):
        finish_bundle(bundle, tmp_path / "again")


def test_runtimes_that_a_profile_does_not_have(tmp_path: Path) -> None:
    for profile, runtime, message in [
        ("cpu", "tensorrt", "profile cpu has one runtime only"),
        ("a100", "onnx", "there is no runtime 'onnx': choose one of tensorrt-rtx, tensorrt"),
    ]:
        with pytest.raises(PrismError, match=message):
            build_engine(profile=profile, runtime=runtime, target=tmp_path, drafter=None, out=tmp_path / "engine")
