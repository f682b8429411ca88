from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from typer.testing import CliRunner

from prism_trt.config import GenerationConfig, TrainConfig
from prism_trt.data.online import OnlineFeatures
from prism_trt.data.sequences import FeatureSequence
from prism_trt.drafter.checkpoint import load_drafter, save_drafter
from prism_trt.errors import PrismError
from prism_trt.speculative.acceptance import AcceptancePrior
from prism_trt.target.loading import load_target
from prism_trt.train.app import app
from prism_trt.train.checkpoints import LATEST
from tests.tiny import tiny_drafter, tiny_target
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
        ({"out": "drafter", "work": "afile"}, "afile is a file, .*: choose another --work"),
        ({"out": "afile/drafter"}, "afile is a file, .*: choose another --out"),
        ({"out": "drafter", "cache": "afile/cache"}, "afile is a file, .*: choose another --cache"),
        ({"out": "drafter", "step_map": "0,2"}, "^command line: step_map must use every module"),
    ],
)
def test_mistakes_are_named(
    changes: dict[str, str], message: str, trained_on: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("afile").touch()
    with pytest.raises(PrismError, match=message):
        CliRunner().invoke(app(), arguments(trained_on, **changes), catch_exceptions=False)
    assert [path.name for path in tmp_path.iterdir()] == ["afile"]


def write_prompts(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"Say {i} words"}) + "\n" for i in range(count)))
    return path


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "nowhere"}, "nowhere has no config.json"),
        ({"init": "two", "kind": "eagle2"}, "can only be tuned as it is"),
        ({"wandb": "project"}, "needs the package wandb"),
        ({"step_map": "auto", "hold_back": "0"}, "step_map auto measures on answers held back"),
        ({"step_map": "auto", "max_new_tokens": "5", "hold_back": "2"}, "no answer held back has so many tokens"),
        ({"kind": "standard", "width": "33"}, "--width 33 is not a multiple"),
        ({"hold_back": "13"}, "--hold-back 13 would hold back 13 of 24 answers"),
        ({"hold_back": "4", "answers": "7"}, "--hold-back 4 would hold back 4 of 7 answers"),
        ({"sampled_share": "0.9"}, "greedy answers, so only sampled ones are left"),
        ({"one_step_updates": "0", "alignment_updates": "0", "tuning_updates": "0"}, "would stay random"),
    ],
)
def test_mistakes_are_named_before_answers_are_generated(
    changes: dict[str, str],
    message: str,
    dry_run: bool,
    trained_on: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    save_drafter(tiny_drafter(tiny_target(), modules=2), Path("two"))
    data = write_prompts(Path("prompts.jsonl"), 24)
    options = arguments(trained_on, **{"data": str(data), "cache": "cache", "out": "drafter", **changes})
    with pytest.raises(PrismError, match=message):
        CliRunner().invoke(app(), options + ["--dry-run"] * dry_run, catch_exceptions=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "two"]


def test_a_refused_run_leaves_the_accounting_of_an_existing_cache(trained_on: Path, tmp_path: Path) -> None:
    accounting = tmp_path / "cache.data.json"

    def answer(prompts: int, *extra: str) -> None:
        data = write_prompts(tmp_path / f"{prompts}.jsonl", prompts)
        options = ["--target", str(trained_on / "target"), "--data", str(data), "--cache", str(tmp_path / "cache")]
        options += ["--max-new-tokens", "8", "--generate-only", *extra]
        assert CliRunner().invoke(app(), options, catch_exceptions=False).exit_code == 0

    answer(9, "--dry-run")
    assert not accounting.exists()
    answer(9)
    before = accounting.read_bytes()
    assert json.loads(before)["prompts"] == 9
    for extra in ([], ["--dry-run"]):
        with pytest.raises(PrismError, match="another --cache"):
            answer(5, *extra)
    assert accounting.read_bytes() == before


@pytest.mark.parametrize("started", [["prism-trt", "train"], ["prism_trt/train/__main__.py"]])
def test_the_command_is_recorded_as_it_can_be_repeated(
    started: list[str], trained_on: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = arguments(trained_on, out=str(tmp_path / "drafter"), kind="eagle2", one_step_updates="1")
    monkeypatch.setattr(sys, "argv", [*started, *options])
    CliRunner().invoke(app(), options, catch_exceptions=False)
    provenance = json.loads((tmp_path / "drafter" / "config.json").read_text())["provenance"]
    assert provenance["command"] == ["prism-trt", "train", *options]


def test_what_cannot_be_simulated_is_said(trained_on: Path, tmp_path: Path) -> None:
    data = write_prompts(tmp_path / "prompts.jsonl", 24)
    quick = {"data": str(data), "kind": "eagle2", "one_step_updates": "1"}

    def run(name: str, **changes: str) -> tuple[str, AcceptancePrior]:
        out = tmp_path / name
        options = arguments(trained_on, **quick, out=str(out), cache=str(tmp_path / f"{name}-cache"), **changes)
        said = CliRunner().invoke(app(), options, catch_exceptions=False).output
        return said, AcceptancePrior.of(load_drafter(out).config)

    said, prior = run("sampled", sampled_share="1")
    assert "no answer is greedy, so none is held back and no acceptance length is simulated" in said
    assert prior == AcceptancePrior()
    said, prior = run("short", max_new_tokens="4")
    assert "simulated acceptance length not measured" in said and "1.000" not in said
    assert prior == AcceptancePrior()


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
    prompts = write_prompts(tmp_path / "prompts.jsonl", 24)
    options = arguments(trained_on, data=str(prompts), out=str(tmp_path / "drafter"), slots="10")
    at = options.index("--cache")  # then it is in the directory of checkpoints
    said = finish([*options[:at], *options[at + 2 :], "--dry-run"])
    for pattern in (
        r"answers: 24 of up to 256 tokens at [\d,]+ tokens/s .*\(measured on 8 of 33 tokens\), at most \d+ min",
        r"drafter: [\d,]+ trained parameters",
        r"step 1 and later steps: module 1, [\d,]+ parameters and a head of 12,800",
        r"stage tuning: 8 updates at [\d,]+ rows/s",
        r"memory: \d+\.\d GiB",
        r"checkpoints: \d+\.\d\d GB",
        r"feature cache: at most \d+\.\d\d GB for 24 answers",
    ):
        assert re.search(pattern, said), (pattern, said)
    on_cache = finish([*arguments(trained_on, out=str(tmp_path / "drafter"), draft_vocab_size="0"), "--dry-run"])
    assert "stage tuning" in on_cache and "feature cache" not in on_cache and "answers:" not in on_cache
    assert "step 0: module 0, 38,976 parameters and a head of 20,480" in on_cache
    assert list(tmp_path.iterdir()) == [prompts]


def planned(trained_on: Path, directory: Path) -> list[str]:
    """Options of a dry run whose answers are still to be generated."""
    data = write_prompts(directory / "prompts.jsonl", 24)
    places = {"data": str(data), "cache": str(directory / "cache"), "out": str(directory / "drafter")}
    return [*arguments(trained_on, **places), "--dry-run"]


def test_a_dry_run_starts_from_the_initial_drafter(trained_on: Path, tmp_path: Path) -> None:
    save_drafter(tiny_drafter(tiny_target(), modules=1, fc_bias=True), tmp_path / "init")
    options = [*arguments(trained_on, init=str(tmp_path / "init"), out=str(tmp_path / "drafter")), "--dry-run"]
    said = CliRunner().invoke(app(), options, catch_exceptions=False).output
    assert "step 0: module 0, 39,040 parameters" in said


def test_a_dry_run_online_measures_the_passes_of_the_target(
    trained_on: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    compute = OnlineFeatures.sequence

    def sequence(self: OnlineFeatures, index: int) -> FeatureSequence:
        asked.append(index)
        return compute(self, index)

    monkeypatch.setattr(OnlineFeatures, "sequence", sequence)
    said = CliRunner().invoke(app(), [*planned(trained_on, tmp_path), "--online"], catch_exceptions=False).output
    assert "stage tuning" in said
    assert asked


def test_a_dry_run_tells_of_a_disk_that_is_too_small(
    trained_on: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []

    def small(path: Path) -> SimpleNamespace:
        places.append(path)
        return SimpleNamespace(free=500_000)

    monkeypatch.setattr(shutil, "disk_usage", small)
    result = CliRunner().invoke(app(), planned(trained_on, tmp_path))
    assert isinstance(result.exception, PrismError)
    assert re.fullmatch(r"the feature cache may not fit into \S+: pass --cache on a .*", str(result.exception))
    assert "checkpoints: 0.00 GB in " in result.output
    assert re.search(r"warning: \S+drafter\.work has no room for the checkpoints", result.output)
    assert set(places) == {tmp_path}
