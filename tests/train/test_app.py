from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from typer.testing import CliRunner

from prism_trt.config import GenerationConfig, TrainConfig
from prism_trt.drafter.checkpoint import load_drafter
from prism_trt.errors import PrismError
from prism_trt.target.loading import load_target
from prism_trt.train.app import app
from prism_trt.train.checkpoints import LATEST
from tests.train.synthetic import write_target_and_cache

SMALL = {
    "--draft-vocab-size": "200",
    "--one-step-updates": "20",
    "--alignment-updates": "8",
    "--tuning-updates": "8",
    "--rows-per-update": "128",
    "--hold-back": "6",
    "--save-every": "2",
    "--simulate-every": "10",
    "--log-every": "4",
    "--threads": "1",
}


def arguments(directory: Path, **changes: str) -> list[str]:
    """Options of a small run on the target and the cache of `directory`."""
    options = {"--target": str(directory / "target"), "--cache": str(directory / "cache"), **SMALL}
    options |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return [part for option in options.items() for part in option]


def start(options: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "prism_trt.train", *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(options: list[str]) -> str:
    """Run to the end and return what was printed."""
    process = start(options)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output + errors


def digest(drafter: Path) -> str:
    return hashlib.sha256((drafter / "model.safetensors").read_bytes()).hexdigest()


def test_a_killed_run_continues_to_bit_identical_weights(trained_on: Path, tmp_path: Path) -> None:
    finish(arguments(trained_on, out=str(tmp_path / "whole")))

    cut = arguments(trained_on, out=str(tmp_path / "cut"))
    process = start(cut)
    checkpoint = tmp_path / "cut.work" / LATEST
    deadline = time.monotonic() + 200
    while not checkpoint.is_file() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it must be killed while it trains"
    assert not (tmp_path / "cut").exists()

    printed = finish(cut)
    assert re.search(r"continuing stage \w+ after update [1-9]", printed)
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_prompts_to_drafter(trained_on: Path, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    texts = ["The dog", "sleeps", "0 1 2 3", "the lazy fox", "Numbers", "jumps over", "quick", "brown 9 8"]
    data.write_text("".join(json.dumps({"prompt": text, "source": "test"}) + "\n" for text in texts))
    options = arguments(
        trained_on,
        data=str(data),
        out=str(tmp_path / "drafter"),
        cache=str(tmp_path / "answers"),
        max_new_tokens="12",
        hold_back="2",
        slots="4",
    )
    result = CliRunner().invoke(app(), options, catch_exceptions=False)
    assert result.exit_code == 0, result.output

    drafter = load_drafter(tmp_path / "drafter", load_target(trained_on / "target"))
    provenance = drafter.config.provenance
    assert provenance["data_sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert provenance["training"]["one_step_updates"] == 20
    assert provenance["rows"] > 0
    assert provenance["simulated_acceptance"]["chain"] >= 1
    assert provenance["cache"]["counts"]["sequences"] + provenance["cache"]["counts"]["too_short"] == len(texts)

    events = EventAccumulator(str(tmp_path / "drafter.work" / "tensorboard"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"train/loss", "train/top1/step_3", "simulated/acceptance_length"} <= set(scalars)
    assert [e.step for e in events.Scalars("simulated/acceptance_length")] == [10, 20, 28, 36]

    with pytest.raises(PrismError, match="--overwrite"):
        CliRunner().invoke(app(), options, catch_exceptions=False)


def test_every_field_is_an_option_with_help() -> None:
    result = CliRunner().invoke(app(), ["--help"], env={"COLUMNS": "300", "TERM": "dumb"})
    for model in (GenerationConfig, TrainConfig):
        for name, field in model.model_fields.items():
            assert f"--{name.replace('_', '-')}" in result.output
            assert field.description
            assert field.description in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--out is missing"),
        ({"out": "drafter", "optimizer": "sgd"}, "optimizer"),
        ({"out": "drafter", "clip": "0"}, "clip"),
        ({"out": "drafter", "cache": "nowhere"}, "pass --data"),
        ({"out": "drafter", "target": "nowhere"}, "nowhere does not exist"),
        ({"out": "drafter", "data": "nowhere.jsonl"}, "cannot read nowhere.jsonl"),
    ],
)
def test_mistakes_are_named(
    changes: dict[str, str], message: str, trained_on: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PrismError, match=message):
        CliRunner().invoke(app(), arguments(trained_on, **changes), catch_exceptions=False)


def test_a_cache_of_another_target_is_refused(trained_on: Path, tmp_path: Path) -> None:
    write_target_and_cache(tmp_path, prompts=10)
    other = json.loads((tmp_path / "target" / "config.json").read_text())
    other["rms_norm_eps"] = 1e-4
    (tmp_path / "target" / "config.json").write_text(json.dumps(other))
    with pytest.raises(PrismError, match="another target or tokenizer"):
        CliRunner().invoke(app(), arguments(tmp_path, out=str(tmp_path / "drafter")), catch_exceptions=False)


@pytest.mark.parametrize("features", ["last", "multi"])
def test_features_computed_while_training_give_the_same_drafter(
    trained_on: Path, tmp_path: Path, features: str
) -> None:
    """One run generates features to disk; the other keeps tokens only and asks the target."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {i} words"}) + "\n" for i in range(24)))
    common = {"data": str(prompts), "max_new_tokens": "24", "features": features, "hold_back": "3"}
    for name, extra in (("disk", []), ("online", ["--online"])):
        paths = {"cache": str(tmp_path / name / "cache"), "out": str(tmp_path / name / "drafter")}
        finish([*arguments(trained_on, **common, **paths), *extra])
    size = {name: (tmp_path / name / "cache" / "shard-00000.safetensors").stat().st_size for name in ("disk", "online")}
    assert size["online"] < size["disk"] / 10
    assert digest(tmp_path / "online" / "drafter") == digest(tmp_path / "disk" / "drafter")


def test_a_dry_run_says_what_the_run_needs_and_writes_nothing(trained_on: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {i} words"}) + "\n" for i in range(24)))
    options = arguments(trained_on, data=str(prompts), cache=str(tmp_path / "cache"), out=str(tmp_path / "drafter"))
    said = finish([*options, "--dry-run"])
    for pattern in (
        r"drafter: [\d,]+ trained parameters",
        r"step 1 and later steps: module 1, [\d,]+ parameters and a head of 12,800",
        r"stage tuning: 8 updates at [\d,]+ rows/s",
        r"memory: \d+\.\d GiB",
        r"checkpoints: \d+\.\d\d GB",
        r"feature cache: at most \d+\.\d\d GB for 24 answers",
    ):
        assert re.search(pattern, said), (pattern, said)
    assert not (tmp_path / "cache").exists() and not (tmp_path / "drafter").exists()
    on_cache = finish([*arguments(trained_on, out=str(tmp_path / "drafter")), "--dry-run"])
    assert "stage tuning" in on_cache and "feature cache" not in on_cache
