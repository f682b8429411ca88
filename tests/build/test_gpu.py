"""Engines for GPUs that are not here: compiled, checked and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prism_trt.build import build_engine
from prism_trt.build.builder import finish_bundle
from prism_trt.build.bundle import BundleManifest
from prism_trt.build.gpu import gpu_limits
from prism_trt.build.plan import BuildPlan
from prism_trt.build.profile import GpuProfile, load_profile
from prism_trt.convert.walker import make_walker_engine
from prism_trt.drafter.checkpoint import load_drafter, save_drafter, weights_sha256
from prism_trt.engines.loading import DRAFTER_DIRECTORY, TARGET_DIRECTORY, load_engine
from prism_trt.engines.manifest import read_engine_manifest
from prism_trt.engines.protocol import Engine
from prism_trt.errors import PrismError
from prism_trt.inspect.artifacts import inspect_path
from prism_trt.target.loading import Target, load_target, save_hf
from tests.tiny import tiny_drafter, tiny_target


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Tiny models whose heads are wide enough for TensorRT's fused attention."""
    directory = tmp_path_factory.mktemp("models")
    target = tiny_target(hidden_size=128, head_dim=64)
    save_hf(target, directory / "target")
    save_drafter(tiny_drafter(target), directory / "drafter")
    return directory / "target", directory / "drafter"


@pytest.mark.parametrize(("gpu", "capability", "dtype"), [("a100", "8.0", None), ("rtx4090", "8.9", "bfloat16")])
def test_an_engine_for_another_machine(
    models: tuple[Path, Path], tmp_path: Path, gpu: str, capability: str, dtype: str | None
) -> None:
    out = tmp_path / "engine"
    build_engine(profile=gpu, target=models[0], drafter=models[1], out=out, context=96, slots=2, dtype=dtype)
    manifest = read_engine_manifest(out)
    assert (manifest.runtime, manifest.dtype) == ("tensorrt-rtx", dtype or "float16")
    assert manifest.gpu is not None and manifest.gpu.compute_capability == capability
    networks = manifest.gpu.networks
    assert set(networks) == {"target", "step", "round"}
    assert networks["target"].fused_attentions == 2
    assert networks["round"].fused_attentions == manifest.default_tree.depth
    assert not networks["round"].copied_weights and networks["step"].copied_weights
    assert {path.name for path in out.glob("*.plan")} == {"target.plan", "step.plan", "round.plan"}
    report = inspect_path(out)
    assert report.facts["runs on this machine"] == f"on a GPU of compute capability {capability} only"
    with pytest.raises(PrismError, match="no CUDA device here"):
        load_engine(out)


def test_refusals_leave_nothing_behind(models: tuple[Path, Path], tmp_path: Path) -> None:
    for arguments, message in [
        ({"profile": "rtx4090", "dtype": "float32"}, "float16 or bfloat16, not in float32"),
        ({"profile": "rtx4090", "slots": 400_000}, r"room for 21\.6: lower --slots"),
    ]:
        with pytest.raises(PrismError, match=message):
            build_engine(target=models[0], drafter=models[1], out=tmp_path / "engine", context=96, **arguments)  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())


def test_weights_that_no_setting_makes_fit_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    settings = load_profile("rtx4090")
    assert isinstance(settings, GpuProfile)
    target = load_target(models[0])
    plan = BuildPlan(tmp_path, target, load_drafter(models[1], target), settings.default_tree, 96, 1, None)
    with pytest.raises(PrismError, match=r"the weights need .* room for .*: use a GPU with more memory or --fp8 or"):
        gpu_limits(plan, settings.model_copy(update={"memory_gib": 1e-3}))


def test_a_bundle_for_a_gpu_whose_compiler_needs_it(models: tuple[Path, Path], tmp_path: Path) -> None:
    """The weights come through unchanged, and a network that computes something else would be noticed."""
    out = tmp_path / "bundle"
    manifest = build_engine(profile="h800", target=models[0], drafter=models[1], out=out, context=96, slots=2)
    assert isinstance(manifest, BundleManifest)
    assert set(manifest.deviation) == {"target", "step"}
    assert all(0 < error < 0.02 for error in manifest.deviation.values())
    target = load_target(models[0])
    bundled = load_target(out / TARGET_DIRECTORY)
    assert bundled.fingerprint == target.fingerprint
    assert weights_sha256(load_drafter(out / DRAFTER_DIRECTORY, bundled)) == weights_sha256(load_drafter(models[1]))
    with pytest.raises(PrismError, match="is for h800, which this machine does not have"):
        finish_bundle(out, tmp_path / "engine")
    with pytest.raises(PrismError, match="engine"):
        load_engine(out)
    assert not (tmp_path / "engine").exists()


def test_a_wrong_network_is_not_bundled(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another_model(trt: object, target: Target, *rest: Any, **options: Any) -> Engine:
        return make_walker_engine(trt, tiny_target(seed=9, hidden_size=128, head_dim=64), *rest, **options)

    monkeypatch.setattr("prism_trt.build.bundle.make_walker_engine", another_model)
    with pytest.raises(PrismError, match="target network in float16 deviates by"):
        build_engine(profile="h800", target=models[0], drafter=models[1], out=tmp_path / "bundle", context=96)
    assert not list(tmp_path.iterdir())
