"""`inspect` recognises every kind of artifact and finds every kind of damage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prism_trt.build.builder import build_engine
from prism_trt.cli import load, run
from prism_trt.data.feature_cache import KIND, MANIFEST_FILE, shard_path, write_shard
from prism_trt.data.sequences import FeatureSequence
from prism_trt.deploy.repository import write_repository
from prism_trt.drafter.checkpoint import save_drafter
from prism_trt.errors import PrismError
from prism_trt.inspect.artifacts import inspect_path
from prism_trt.inspect.report import Report
from prism_trt.manifest import write_manifest
from prism_trt.target.loading import Target, save_hf
from tests.tiny import tiny_drafter, tiny_target

HIDDEN = 64


def write_cache(directory: Path, target: Target) -> None:
    directory.mkdir()
    random = torch.Generator().manual_seed(0)
    sequences = [
        FeatureSequence(
            tokens=torch.randint(3, 300, (length,), generator=random),
            features=torch.randn(length - 1, HIDDEN, generator=random),
            prompt_length=4,
            greedy=length % 2 == 0,
        )
        for length in (9, 12, 7)
    ]
    write_shard(shard_path(directory, 0), sequences, {})
    fields = {
        "target_fingerprint": target.fingerprint,
        "feature_layers": [target.config.num_layers],
        "feature_size": HIDDEN,
        "counts": {"sequences": 3},
    }
    write_manifest(directory, MANIFEST_FILE, KIND, fields)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sound artifact of each kind, all of the same tiny target, and another target."""
    root = tmp_path_factory.mktemp("originals")
    target = tiny_target()
    save_hf(target, root / "target")
    save_hf(tiny_target(seed=5, max_position_embeddings=256), root / "other")
    drafter = tiny_drafter(target)
    drafter.config = drafter.config.model_copy(update={"provenance": {"command": ["train", "[quick]"]}})
    save_drafter(drafter, root / "drafter")
    build_engine(target=root / "target", drafter=root / "drafter", out=root / "engine", context=128, slots=2)
    write_repository(root / "engine", root / "repository", tree="8/4/5")
    write_cache(root / "cache", target)
    return root


@pytest.fixture
def artifacts(originals: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may damage."""
    return Path(shutil.copytree(originals, tmp_path / "artifacts"))


def inspect_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        run(load("inspect"), arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def problems(report: Report) -> list[str]:
    return [check.problem for check in report.checks if check.problem is not None]


@pytest.mark.parametrize(
    ("name", "kind", "facts"),
    [
        ("target", "target", {"layers": "2", "hidden size": "64", "vocabulary": "320"}),
        ("drafter", "drafter", {"modules": "2, step map [0, 1]", "draft vocabulary": "200", "dtype": "float32"}),
        ("engine", "engine", {"profile": "cpu", "limits": "2 slots of 128 tokens", "target layers": "2"}),
        ("repository", "model repository", {"model": "prism", "parameter tree": "8/4/5", "engine: profile": "cpu"}),
        ("cache", "feature cache", {"feature_size": "64"}),
    ],
)
def test_sound_artifacts(originals: Path, name: str, kind: str, facts: dict[str, str]) -> None:
    report = inspect_path(originals / name)
    assert (report.kind, problems(report)) == (kind, [])
    assert report.sound
    assert facts.items() <= report.facts.items()
    assert len(report.checks) >= 3 - (name == "drafter")


@pytest.mark.parametrize("name", ["target", "drafter", "engine", "repository", "cache"])
def test_belonging_to_a_target(originals: Path, name: str) -> None:
    assert inspect_path(originals / name, originals / "target").sound
    found = problems(inspect_path(originals / name, originals / "other"))
    assert len(found) == 1
    assert "pass" in found[0]


def test_counts_and_fingerprints_are_the_real_ones(originals: Path) -> None:
    target = tiny_target()
    facts = inspect_path(originals / "target").facts
    assert facts["parameters"] == f"{sum(value.numel() for value in target.model.parameters()):,}"
    assert facts["fingerprint"] == target.fingerprint
    drafter = inspect_path(originals / "drafter").facts
    assert drafter["target fingerprint"] == target.fingerprint
    assert drafter["provenance: command"] == '["train", "[quick]"]'


def test_cache_shows_where_the_loss_starts(originals: Path) -> None:
    target = tiny_target()
    tokens = load_file(shard_path(originals / "cache", 0))["tokens"].tolist()
    facts = inspect_path(originals / "cache", originals / "target").facts
    assert facts["first prompt ends (no loss)"] == repr(target.tokenizer.decode(tokens[:4]))
    assert facts["first answer starts (loss)"] == repr(target.tokenizer.decode(tokens[4:9]))


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def reseal_cache(root: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Damage a shard and write a manifest whose hashes fit it."""
    edit_tensors(shard_path(root / "cache", 0), change)
    write_manifest(root / "cache", MANIFEST_FILE, KIND, {"feature_size": HIDDEN})


def largest_file(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


FC = "modules.0.fc.weight"
DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "target truncated": ("target", lambda r: truncate(r / "target/model.safetensors"), "truncated or damaged"),
    "target without tokenizer": ("target", lambda r: (r / "target/tokenizer.json").unlink(), "does not exist"),
    "target of another architecture": (
        "target",
        lambda r: edit_json(r / "target/config.json", lambda c: c.update(model_type="gpt2")),
        "'gpt2' is not supported",
    ),
    "target not finite": (
        "target",
        lambda r: edit_tensors(r / "target/model.safetensors", lambda t: t["model.norm.weight"].fill_(torch.nan)),
        "model.norm.weight holds infinite or undefined values",
    ),
    "drafter truncated": ("drafter", lambda r: truncate(r / "drafter/model.safetensors"), "cannot be read"),
    "drafter lacks a tensor": (
        "drafter",
        lambda r: edit_tensors(r / "drafter/model.safetensors", lambda t: t.pop(FC)),
        f"lacks the tensor {FC}",
    ),
    "drafter of another shape": (
        "drafter",
        lambda r: edit_tensors(r / "drafter/model.safetensors", lambda t: t.update({FC: torch.zeros(3, 3)})),
        f"{FC} has shape \\[3, 3\\]",
    ),
    "drafter not finite": (
        "drafter",
        lambda r: edit_tensors(r / "drafter/model.safetensors", lambda t: t[FC].fill_(torch.inf)),
        f"{FC} holds infinite or undefined values",
    ),
    "drafter with an unknown key": (
        "drafter",
        lambda r: edit_json(r / "drafter/config.json", lambda c: c.update(colour="blue")),
        "colour: ",
    ),
    "engine with a flipped bit": ("engine", lambda r: flip_last_byte(largest_file(r / "engine")), "is corrupted"),
    "engine truncated": ("engine", lambda r: truncate(largest_file(r / "engine")), "bytes instead of"),
    "engine without tokenizer": ("engine", lambda r: (r / "engine/tokenizer/tokenizer.json").unlink(), "is missing"),
    "engine of another drafter": (
        "engine",
        lambda r: edit_json(r / "engine/engine.json", lambda m: m["drafter"].update(target_fingerprint="0" * 64)),
        "the drafter was trained for target 000000000000, not ",
    ),
    "engine of another width": (
        "engine",
        lambda r: edit_json(r / "engine/engine.json", lambda m: m["drafter"].update(hidden_size=32)),
        "the drafter has hidden size 32, the target 64",
    ),
    "engine of another format": (
        "engine",
        lambda r: edit_json(r / "engine/engine.json", lambda m: m.update(format=99)),
        "of format 99",
    ),
    "repository with a flipped bit": (
        "repository",
        lambda r: flip_last_byte(r / "repository/prism/config.pbtxt"),
        "is corrupted",
    ),
    "repository without engine": (
        "repository",
        lambda r: shutil.rmtree(r / "repository/prism/1/engine"),
        "is missing",
    ),
    "cache with a flipped bit": ("cache", lambda r: flip_last_byte(shard_path(r / "cache", 0)), "is corrupted"),
    "cache truncated": ("cache", lambda r: truncate(shard_path(r / "cache", 0)), "bytes instead of"),
    "cache lacks features": (
        "cache",
        lambda r: reseal_cache(r, lambda t: t.update(features=t["features"][:-1].clone())),
        "holds tensors of shapes .*'features': \\[24, 64\\]",
    ),
    "cache without answers": (
        "cache",
        lambda r: reseal_cache(r, lambda t: t["prompt_lengths"].fill_(9)),
        "without an answer",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(artifacts: Path, damage: str) -> None:
    name, act, message = DAMAGE[damage]
    act(artifacts)
    report = inspect_path(artifacts / name)
    assert not report.sound
    assert re.search(message, problems(report)[0])


def test_unfinished_cache(tmp_path: Path, originals: Path) -> None:
    shutil.copytree(originals / "cache", tmp_path / "cache")
    (tmp_path / "cache" / MANIFEST_FILE).rename(tmp_path / "cache" / "plan.json")
    report = inspect_path(tmp_path / "cache")
    assert report.kind == "feature cache"
    assert problems(report)[0].endswith("run the same training command again to go on")


def test_unknown_things_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="nothing does not exist"):
        inspect_path(tmp_path / "nothing")
    with pytest.raises(PrismError, match=r"is none of target .* and model repository: pass the directory"):
        inspect_path(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(PrismError, match="is none of target"):
        inspect_path(tmp_path / "notes.txt")
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(PrismError, match="is not readable JSON"):
        inspect_path(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(PrismError, match="must hold a JSON object"):
        inspect_path(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGXX and more")
    assert problems(inspect_path(tmp_path / "model.gguf")) == [
        f"{tmp_path}/model.gguf is not a GGUF file: pass a Hugging Face model directory or a GGUF file"
    ]


def test_command_line_of_a_sound_artifact(originals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_command(str(originals / "drafter")) == 0
    text = capsys.readouterr().out
    assert "sound" in text
    assert "[quick]" in text
    assert inspect_command(str(originals / "drafter"), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["sound"]) == ("drafter", True)
    assert [check["problem"] for check in report["checks"]] == [None, None]


def test_command_line_of_a_damaged_artifact(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(artifacts / "drafter/model.safetensors")
    assert inspect_command(str(artifacts / "drafter")) == 2
    assert "NOT sound" in capsys.readouterr().out
    assert inspect_command(str(artifacts / "drafter"), "--json") == 2
    assert json.loads(capsys.readouterr().out)["sound"] is False
    assert inspect_command(str(artifacts / "nothing")) == 2
    assert capsys.readouterr().err.endswith("does not exist: pass a file or directory that does\n")
