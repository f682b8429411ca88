"""Model repositories: complete, self-contained, whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prism_trt.deploy import repository as writer
from prism_trt.deploy.repository import MANIFEST, read_repository, write_repository
from prism_trt.engines.manifest import EngineManifest, read_engine_manifest
from prism_trt.errors import PrismError
from prism_trt.manifest import verify_files
from tests.deploy.conftest import SLOTS, TREE

ROOT = Path(__file__).parents[2]


def test_contents(repository: Path, engine_path: Path) -> None:
    manifest = read_repository(repository)
    verify_files(repository, manifest)
    assert manifest["model"] == "prism"
    assert manifest["parameters"] == {
        "engine": "engine",
        "backlog": "8",
        "prefix_cache": "on",
        "tree": TREE,
        "threads": "1",
    }
    served = repository / "prism" / "1" / "engine"
    names = sorted(path.relative_to(engine_path) for path in engine_path.rglob("*"))
    assert sorted(path.relative_to(served) for path in served.rglob("*")) == names
    weights = next(path for path in served.rglob("*") if path.suffix in (".bin", ".safetensors"))
    assert weights.stat().st_ino == (engine_path / weights.relative_to(served)).stat().st_ino
    for file in (repository / "prism" / "config.pbtxt", repository / "prism" / "1" / "model.py"):
        assert str(engine_path) not in file.read_text()
    assert "instance_group [ { kind: KIND_MODEL count: 1 } ]" in (repository / "prism" / "config.pbtxt").read_text()


def test_files_are_copied_where_they_cannot_be_linked(
    engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("different file systems")

    monkeypatch.setattr(os, "link", refuse)
    out = write_repository(engine_path, tmp_path / "out")
    verify_files(out, read_repository(out))


def test_nothing_appears_when_writing_fails(engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_repository(engine_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_overwrite_must_be_asked_for(engine_path: Path, tmp_path: Path) -> None:
    out = write_repository(engine_path, tmp_path / "out", "first")
    with pytest.raises(PrismError, match="already exists"):
        write_repository(engine_path, out)
    assert (out / "first").is_dir()
    write_repository(engine_path, out, "second", overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [MANIFEST, "second"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model_name": "../x"}, "cannot name a model"),
        ({"model_name": ""}, "cannot name a model"),
        ({"tree": "60"}, "SIZE/WIDTH/DEPTH"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"slots": 100_000}, f"engine has {SLOTS} slots, not 100000: ask for fewer or build it with --slots 100000"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"backlog": -1}, "backlog must be at least 0"),
        ({"prefill_tokens": 0}, "prefill_tokens must be at least 1"),
    ],
)
def test_mistakes(engine_path: Path, tmp_path: Path, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PrismError, match=sentence):
        write_repository(engine_path, tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("others", "arguments", "sentence"),
    [
        ({"runtime": "torch-cuda"}, {"threads": 2}, "computes on a GPU, .*: leave out --threads"),
        ({"gpu": object()}, {"threads": 2}, "computes on a GPU, .*: leave out --threads"),
        ({"gpu": object()}, {"slots": SLOTS - 1}, f"always has its {SLOTS} slots: leave out --slots"),
    ],
)
def test_settings_that_an_engine_ignores_are_refused(
    engine_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    others: dict[str, Any],
    arguments: dict[str, Any],
    sentence: str,
) -> None:
    def read(path: Path) -> EngineManifest:
        return read_engine_manifest(path).model_copy(update=others)

    monkeypatch.setattr(writer, "read_engine_manifest", read)
    with pytest.raises(PrismError, match=sentence):
        write_repository(engine_path, tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []
    write_repository(engine_path, tmp_path / "out", slots=SLOTS)


def test_an_intact_repository_of_the_same_is_reused(engine_path: Path, tmp_path: Path) -> None:
    out = write_repository(engine_path, tmp_path / "out", slots=2)
    written = (out / MANIFEST).stat().st_mtime_ns
    assert write_repository(engine_path, out, slots=2, reuse=True) == out
    assert (out / MANIFEST).stat().st_mtime_ns == written
    other = tmp_path / "engine"
    shutil.copytree(engine_path, other)
    values = json.loads((other / "engine.json").read_text())
    (other / "engine.json").write_text(json.dumps({**values, "versions": {"prism_trt": "other"}}))
    for engine, arguments in (
        (engine_path, {}),
        (engine_path, {"slots": 2, "backlog": 3}),
        (engine_path, {"slots": 2, "model_name": "another"}),
        (other, {"slots": 2}),
    ):
        with pytest.raises(PrismError, match="already exists: choose another output path or pass --overwrite"):
            write_repository(engine, out, **arguments, reuse=True)
    (out / "prism" / "1" / "engine" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(PrismError, match="already exists"):
        write_repository(engine_path, out, slots=2, reuse=True)
    assert write_repository(engine_path, tmp_path / "new", slots=2, reuse=True).is_dir()


def test_a_flipped_bit_is_found_when_the_repository_is_written(engine_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "engine"
    shutil.copytree(engine_path, copy)
    with (copy / "weights.bin").open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(PrismError, match=r"engine/weights\.bin is corrupted \(its SHA-256 differs\)"):
        write_repository(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_a_damaged_engine_is_refused(engine_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "engine"
    shutil.copytree(engine_path, copy)
    (copy / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(PrismError, match=r"tokenizer\.json is missing"):
        write_repository(copy, tmp_path / "out")
    with pytest.raises(PrismError, match="is not a directory"):
        write_repository(tmp_path / "absent", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_manifest_without_a_model_is_refused(repository: Path, tmp_path: Path) -> None:
    values = json.loads((repository / MANIFEST).read_text())
    del values["model"]
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    (copy / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(PrismError, match="names no model"):
        read_repository(copy)


def test_command_writes_without_serving(engine_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "prism_trt.deploy", "--engine", str(engine_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    read_repository(tmp_path / "out")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "pass --overwrite" in again.stderr
