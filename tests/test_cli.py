"""Command lines: every one starts, and mistakes end in one sentence."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from prism_trt.cli import COMMANDS, run
from prism_trt.errors import PrismError
from prism_trt.progress import progress, track

ROOT = Path(__file__).parent.parent


def exit_code(app: typer.Typer, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        run(app, arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def one_command(error: BaseException | None) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    def command(count: int = 1) -> None:
        if error is not None:
            raise error

    return app


@pytest.mark.parametrize("name", COMMANDS)
def test_python_dash_m_shows_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"python -m prism_trt.{name}", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"prism_trt.{name}", run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    assert "Usage:" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_prism_trt_forwards_to_the_same_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prism-trt", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("prism_trt", run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    assert f"prism-trt {name}" in capsys.readouterr().out


def loaded_modules(code: str) -> set[str]:
    script = f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_command_list_imports_no_command() -> None:
    modules = loaded_modules("import prism_trt.cli; prism_trt.cli.app()")
    assert "torch" not in modules
    assert not [name for name in modules if name.startswith("prism_trt.") and name.count(".") > 1]


@pytest.mark.parametrize("name", ["train", "build", "deploy", "client", "inspect"])
def test_a_command_imports_no_other_command(name: str) -> None:
    modules = loaded_modules(f"import prism_trt.cli; prism_trt.cli.load({name!r})")
    apps = {command.module for command in COMMANDS.values()}
    assert modules & apps == {COMMANDS[name].module}


def test_a_mistake_is_one_sentence_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(one_command(PrismError("the pot is empty: fill it"))) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: the pot is empty: fill it\n"
    assert captured.out == ""


def test_a_missing_package_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(one_command(ModuleNotFoundError("no", name="tensorboard.compat"))) == 2
    assert capsys.readouterr().err.startswith("error: this needs the package tensorboard.compat: install ")


@pytest.mark.parametrize("error", [ModuleNotFoundError("no", name="prism_trt.nothing"), ValueError("a bug")])
def test_bugs_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run(one_command(error), [])


def test_interruption_is_exit_code_130() -> None:
    assert exit_code(one_command(KeyboardInterrupt())) == 130


def test_interruption_by_signal_shows_no_traceback() -> None:
    script = (
        "import time, typer\n"
        "from prism_trt.cli import run\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def wait() -> None:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "run(app)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_success_and_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(one_command(None)) == 0
    assert exit_code(one_command(None), "--count", "many") == 2
    assert "--count" in capsys.readouterr().err


def test_track_yields_everything_and_is_silent_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2, 3], "counting")) == [1, 2, 3]
    assert list(track(iter("ab"), "counting")) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_progress_prints_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress("working", total=4) as reporter:
        for _ in range(4):
            now[0] += 6
            reporter.advance()
    assert capsys.readouterr().err == "working: 2/4 after 12 s\nworking: 4/4 after 24 s\n"


def test_progress_draws_a_bar_on_a_terminal() -> None:
    master, slave = os.openpty()
    script = "from prism_trt.progress import track\nfor item in track([1, 2], 'counting'): pass"
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=slave, env=environment)
    os.close(slave)
    drawn = b""
    try:
        while chunk := os.read(master, 4096):
            drawn += chunk
    except OSError:  # Linux reports the closed terminal as an input/output error
        pass
    os.close(master)
    assert process.wait(timeout=20) == 0
    assert b"counting" in drawn
    assert b"2/2" in drawn
