"""The script of GPU checks, but for the GPU: its command lines, its limits, and how it goes on."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from prism_trt.cli import load

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "gpu_checks.py"
MACHINE = {"GPU": "none"}


@pytest.fixture(scope="module")
def checks() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_checks", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def inputs(checks: Any, out: Path, capability: str = "8.0", **changes: Any) -> Any:
    fields = {
        "out": out,
        "target": out / "model.gguf",
        "drafter": checks.DRAFTER,
        "prompts": checks.PROMPTS,
        "questions": (out / "question.jsonl", out / "more.jsonl"),
        "answers": 100,
        "capability": capability,
    }
    return checks.Inputs(**{**fields, **changes})


def our_options(command: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    if command[0] == "-m" and command[1].startswith("prism_trt."):
        yield command[1].removeprefix("prism_trt."), list(command[2:])


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.9", "9.0"])
def test_every_command_line_is_valid(checks: Any, tmp_path: Path, capability: str) -> None:
    steps = checks.all_steps(inputs(checks, tmp_path, capability))
    seen = set()
    for step in steps:
        for name, arguments in our_options(step.command):
            typer.main.get_command(load(name)).make_context(name, arguments)
            seen.add(name)
        if step.command[0].endswith(".py"):
            assert (ROOT / step.command[0]).is_file()
            known = (ROOT / step.command[0]).read_text()
            assert all(f'"{word}"' in known for word in step.command if word.startswith("--"))
    assert seen == {"build", "bench", "train"}
    names = [step.name for step in steps]
    assert names[:2] == ["tests", "kernels"] and names.index("training") > names.index("decode-cuda")
    runtimes = {
        "7.5": (),
        "8.0": ("tensorrt-rtx", "tensorrt"),
        "8.9": ("tensorrt-rtx", "tensorrt"),
        "9.0": ("tensorrt",),
    }
    assert {name for name in names if name.startswith("build-tensorrt")} == {f"build-{r}" for r in runtimes[capability]}
    assert "tests/plugins/test_gpu.py" in steps[0].command and "tests/test_cli.py" not in steps[0].command
    assert all((ROOT / word).is_file() for word in steps[0].command if word.startswith("tests/"))
    assert ("--fp8" in steps[1].command) == (float(capability) >= 8.9)


def python(checks: Any, name: str, code: str, minutes: float = 1, **options: Any) -> Any:
    return checks.Step(name, ("-c", code), minutes, **options)


def test_steps_pass_fail_and_end_in_time_and_the_rest_goes_on(checks: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    steps = [
        python(checks, "good", f"open({str(mark)!r}, 'a').write('x'); print('fine')", table=tmp_path / "table.md"),
        python(checks, "bad", "print('why'); raise SystemExit(3)"),
        python(checks, "slow", "import subprocess; subprocess.run(['sleep', '60'])", minutes=0.02),
        python(checks, "after bad", "pass", after="bad"),
        python(checks, "after good", "pass", after="good"),
        python(checks, "missing", "pass", needs=("no_such_module",)),
    ]
    (tmp_path / "table.md").write_text("| a table |")
    start = time.monotonic()
    outcomes = checks.run_steps(steps, tmp_path, 120, MACHINE)
    assert time.monotonic() - start < 50  # the sleeping grandchild did not hold it up
    found = {name: (o.outcome, o.reason.split(";")[0]) for name, o in outcomes.items()}
    assert found["good"] == ("passed", "") and found["after good"] == ("passed", "")
    assert found["bad"] == ("failed", "exit code 3") and outcomes["bad"].tail == ("why",)
    assert found["slow"] == ("timed out", "after 1 s")
    assert found["after bad"] == ("skipped", "bad did not pass")
    assert found["missing"][0] == "skipped" and "no_such_module" in found["missing"][1]
    report = (tmp_path / "report.md").read_text()
    assert "| a table |" in report and "| bad | failed |" in report and "why" in report
    assert json.loads((tmp_path / "report.json").read_text())["machine"] == MACHINE

    steps[1] = python(checks, "bad", "pass")
    again = checks.run_steps(steps[:2] + steps[3:5], tmp_path, 120, MACHINE)
    assert again["bad"].outcome == again["after bad"].outcome == "passed"
    assert mark.read_text() == "x"  # what had passed was not done again


def test_the_time_is_shared(checks: Any, tmp_path: Path) -> None:
    now = 0.0
    limits = []

    def run(step: Any, seconds: float, log: Path) -> Any:
        nonlocal now
        now += 100
        limits.append(seconds)
        return checks.Outcome(step.command, "passed", 100)

    steps = [python(checks, name, "", minutes) for name, minutes in (("a", 2), ("b", 10), ("c", 10), ("d", 10))]
    outcomes = checks.run_steps(steps, tmp_path, 320, MACHINE, run, lambda: now)
    assert limits == [120, 220, 120]
    assert outcomes["d"].outcome == "skipped" and "time was over" in outcomes["d"].reason
    assert checks.run_steps(steps, tmp_path, 320, MACHINE, run, lambda: now)["d"].outcome == "passed"
    assert len(limits) == 4


def test_what_is_missing_is_said(checks: Any, tmp_path: Path) -> None:
    steps = checks.all_steps(inputs(checks, tmp_path, target=None, questions=()))
    reasons = {step.name: step.lacks for step in steps}
    assert "pass --target" in reasons["build-cuda"] and "pass --target" in reasons["training"]
    steps = checks.all_steps(inputs(checks, tmp_path, target=tmp_path, questions=()))
    reasons = {step.name: step.lacks for step in steps}
    assert reasons["training"] is None and "--questions" in reasons["decode-cuda"]


def test_without_a_gpu_it_says_so(checks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="need an NVIDIA GPU"):
        checks.checks(tmp_path)
    assert not list(tmp_path.iterdir())
