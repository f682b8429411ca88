from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from prism_trt.bench.prompts import PROMPTS as MEASURED
from prism_trt.config import GenerationConfig, TrainConfig
from prism_trt.data.reading import read_records
from prism_trt.data.turns import planned_prompts
from prism_trt.deploy.repository import read_repository
from prism_trt.drafter.checkpoint import load_drafter
from prism_trt.engines.loading import load_engine
from prism_trt.engines.manifest import read_engine_manifest
from prism_trt.manifest import verify_files
from prism_trt.quickstart.artifacts import PROMPTS, prepare_drafter, prepare_engine, prepare_repository
from prism_trt.target.loading import load_target, save_hf
from tests.bench.engines import no_compiler, save_models
from tests.tiny import tiny_target


def quiet(text: str) -> None:
    """Nobody listens."""


def test_shipped_prompts_are_varied_and_apart_from_the_measured_ones() -> None:
    conversations = read_records(PROMPTS).conversations
    prompts = [planned_prompts(conversation)[0][-1]["content"] for conversation in conversations]
    assert len(prompts) >= 200
    assert len(set(prompts)) == len(prompts)
    assert not set(prompts) & set(MEASURED)
    assert max(map(len, prompts)) < 400
    assert len({prompt.split()[0] for prompt in prompts}) > 30


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", autouse=True)
def torch_runtime() -> Iterator[None]:
    with no_compiler():
        yield


@pytest.fixture(scope="module")
def work(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory that holds an engine of `models`."""
    directory = tmp_path_factory.mktemp("work")
    assert not prepare_engine(*models, directory, quiet).reused
    return directory


@pytest.fixture
def own_work(work: Path, tmp_path: Path) -> Path:
    """A copy of `work` to change."""
    return Path(shutil.copytree(work, tmp_path / "work"))


def test_an_engine_is_reused_while_it_fits(models: tuple[Path, Path], own_work: Path) -> None:
    engine = own_work / "engine"
    before = (engine / "engine.json").stat().st_mtime_ns
    artifact = prepare_engine(*models, own_work, quiet)
    assert (artifact.path, artifact.reused) == (engine, True)
    assert (engine / "engine.json").stat().st_mtime_ns == before


def test_a_damaged_engine_is_built_again(models: tuple[Path, Path], own_work: Path) -> None:
    engine = own_work / "engine"
    largest = max((path for path in engine.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert not prepare_engine(*models, own_work, quiet).reused
    verify_files(engine, json.loads((engine / "engine.json").read_text()))
    assert load_engine(engine, threads=1).has_drafter
    assert [path.name for path in own_work.iterdir()] == ["engine"]


def test_an_engine_of_another_drafter_is_built_again(models: tuple[Path, Path], own_work: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(models[1], tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("fc.weight"))
    save_file(weights | {name: weights[name] * 2}, other / "model.safetensors")
    before = read_engine_manifest(own_work / "engine").drafter_sha256
    assert not prepare_engine(models[0], other, own_work, quiet).reused
    assert read_engine_manifest(own_work / "engine").drafter_sha256 != before


def test_an_engine_of_another_version_is_built_again(models: tuple[Path, Path], own_work: Path) -> None:
    path = own_work / "engine" / "engine.json"
    manifest = json.loads(path.read_text())
    manifest["versions"]["prism_trt"] = "0.0.1"
    path.write_text(json.dumps(manifest))
    assert not prepare_engine(*models, own_work, quiet).reused


def test_an_engine_on_torch_is_built_again_once_there_is_a_compiler(
    models: tuple[Path, Path], own_work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remarks: list[str] = []
    shutil.rmtree(own_work / "engine")
    prepare_engine(*models, own_work, remarks.append)
    assert len(remarks) == 1
    assert "torch" in remarks[0]
    assert prepare_engine(*models, own_work, remarks.append).reused
    monkeypatch.setenv("PATH", os.defpath)
    assert not prepare_engine(*models, own_work, remarks.append).reused
    assert read_engine_manifest(own_work / "engine").runtime == "cpp"


def test_a_repository_is_reused_while_it_serves_the_engine_alike(own_work: Path) -> None:
    engine = own_work / "engine"
    first = prepare_repository(engine, own_work, None)
    assert not first.reused
    assert prepare_repository(engine, own_work, None).reused
    assert not prepare_repository(engine, own_work, 1).reused
    assert read_repository(first.path)["parameters"]["threads"] == "1"
    assert prepare_repository(engine, own_work, 1).reused
    manifest = json.loads((engine / "engine.json").read_text())
    # The repository shares the engine's files; a rebuilt engine has new ones.
    (engine / "engine.json").unlink()
    (engine / "engine.json").write_text(json.dumps(manifest | {"profile": "other"}))
    assert not prepare_repository(engine, own_work, 1).reused
    (first.path / "repository.json").unlink()
    assert not prepare_repository(engine, own_work, 1).reused


GENERATION = GenerationConfig(max_prompt_tokens=128, max_new_tokens=24)
TRAINING = TrainConfig(
    draft_vocab_size=200,
    one_step_updates=6,
    alignment_updates=2,
    tuning_updates=2,
    rows_per_update=128,
    hold_back=2,
    compute="float32",
)


def test_a_drafter_is_trained_once_per_input(tmp_path: Path) -> None:
    target = tmp_path / "target"
    save_hf(tiny_target(1), target)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i} quick foxes"}) + "\n" for i in range(12)))
    work = tmp_path / "work"

    first = prepare_drafter(target, work, prompts, GENERATION, TRAINING)
    assert not first.reused
    assert load_drafter(first.path, load_target(target)).config.num_modules == 2
    assert [path.name for path in work.iterdir()] == ["drafter"]

    assert prepare_drafter(target, work, prompts, GENERATION, TRAINING).reused
    more = TRAINING.model_copy(update={"tuning_updates": 3})
    assert not prepare_drafter(target, work, prompts, GENERATION, more).reused
    longer = GENERATION.model_copy(update={"max_new_tokens": 25})
    assert not prepare_drafter(target, work, prompts, longer, more).reused
    prompts.write_text(prompts.read_text() + json.dumps({"prompt": "one more"}) + "\n")
    assert not prepare_drafter(target, work, prompts, longer, more).reused
    assert prepare_drafter(target, work, prompts, longer, more).reused
