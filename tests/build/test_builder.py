"""Building engine directories: what is written, the fallback without a compiler, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism_trt.build import build_engine
from prism_trt.drafter.checkpoint import save_drafter
from prism_trt.engines.cpu.engine import CpuEngine
from prism_trt.engines.loading import load_engine
from prism_trt.engines.manifest import EngineManifest
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from prism_trt.speculative.decoder import Request, generate
from prism_trt.target.loading import save_hf
from tests.tiny import tiny_drafter, tiny_target


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("models")
    target = tiny_target()
    save_hf(target, directory / "target")
    save_drafter(tiny_drafter(target), directory / "drafter")
    return directory / "target", directory / "drafter"


@pytest.fixture(scope="module")
def built(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)  # a relative path, as one types it
        manifest = build_engine(target=models[0], drafter=models[1], out=Path("engine"), context=128)
    assert isinstance(manifest, EngineManifest) and manifest.runtime == "cpp"
    assert manifest.latency_ms is not None and manifest.latency_ms.forward[1][1] > 0
    return directory / "engine"


def test_built_engine_loads_and_decodes(built: Path) -> None:
    engine = load_engine(built, threads=1, slots=2)
    assert isinstance(engine, CpuEngine)
    assert (engine.limits.slots, engine.limits.context) == (2, 128)
    plain, drafted = generate(engine, [Request([5, 6, 7], 20), Request([5, 6, 7], 20, tree=engine.default_tree)])
    assert plain.tokens == drafted.tokens


def test_without_a_compiler_torch_serves(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    remarks: list[str] = []
    out = tmp_path / "engine"
    manifest = build_engine(target=models[0], drafter=models[1], out=out, context=128, say=remarks.append)
    assert isinstance(manifest, EngineManifest)
    assert (manifest.runtime, manifest.dtype, manifest.isa) == ("torch", "float32", None)
    assert len(remarks) == 1
    assert "no C++ compiler" in remarks[0]
    assert isinstance(load_engine(out), TorchEngine)


@pytest.mark.parametrize("file", ["engine.so", "weights.bin", "tokenizer/tokenizer.json", "engine.json"])
def test_damaged_engines_are_refused(models: tuple[Path, Path], tmp_path: Path, file: str) -> None:
    out = tmp_path / "engine"
    build_engine(target=models[0], drafter=None, out=out, context=128)
    content = (out / file).read_bytes()
    (out / file).unlink()  # a new file: the build's library is still mapped, and would lose its pages to a truncation
    (out / file).write_bytes(content[:-20])
    with pytest.raises(PrismError, match="build"):
        load_engine(out)


def test_refusals_leave_nothing_behind(models: tuple[Path, Path], built: Path, tmp_path: Path) -> None:
    target, drafter = models
    stranger = tmp_path / "stranger"
    save_drafter(tiny_drafter(tiny_target(rope_theta=5000.0)), stranger)
    out = tmp_path / "out" / "engine"
    for arguments, message in [
        ({"target": target, "drafter": stranger}, "target"),
        ({"target": tmp_path / "nothing", "drafter": drafter}, "does not exist"),
        ({"target": target, "drafter": tmp_path / "nothing"}, "nothing"),
        ({"target": target, "drafter": drafter, "profile": "h9000"}, "no profile"),
        ({"target": target, "drafter": drafter, "context": 100000}, "positions"),
    ]:
        with pytest.raises(PrismError, match=message):
            build_engine(out=out, **arguments)  # type: ignore[arg-type]
        assert not out.parent.exists() or not list(out.parent.iterdir())
    with pytest.raises(PrismError, match="already exists"):
        build_engine(target=target, drafter=drafter, out=built)
