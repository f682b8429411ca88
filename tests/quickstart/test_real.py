"""The real quickstart, as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from prism_trt.engines.manifest import read_engine_manifest
from prism_trt.manifest import verify_files

pytestmark = pytest.mark.slow


@dataclass
class Run:
    """A quickstart in a process group of its own, as under a terminal, with a mark that its descendants inherit."""

    work: Path
    scratch: Path
    arguments: tuple[str, ...] = ()
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    text: str = ""

    def start(self) -> None:
        self.scratch.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prism_trt.quickstart", "--work", str(self.work), *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "QUICKSTART_MARK": self.mark, "TMPDIR": str(self.scratch), "PYTHONUNBUFFERED": "1"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while piece := self.process.stdout.readline():
            self.text += piece

    def wait_for(self, marker: str, timeout: float = 900) -> None:
        deadline = time.monotonic() + timeout
        while marker not in self.text:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)

    def finish(self, timeout: float) -> int:
        code = self.process.wait(timeout)
        self._reader.join(10)
        return code

    def descendants(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("QUICKSTART_MARK") == self.mark:
                    found.append(" ".join(process.cmdline()))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A complete first run; its work directory serves the other tests."""
    directory = tmp_path_factory.mktemp("real")
    run = Run(directory / "work", directory / "scratch", ("--json", str(directory / "q.json")))
    run.start()
    yield run
    run.kill()


def test_first_run_completes(finished: Run) -> None:
    assert finished.finish(timeout=900) == 0, finished.text
    figures = json.loads((finished.work.parent / "q.json").read_text())
    assert figures["identical"] is True
    assert figures["vanilla_tps"] > 0
    assert figures["speedup"] == pytest.approx(figures["prism_tps"] / figures["vanilla_tps"])
    assert 1 < figures["acceptance_length"] <= 1 + len(figures["per_step_acceptance"])
    assert all(0 < share < 1 for share in figures["per_step_acceptance"])
    assert (finished.work / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in finished.text
    assert not finished.descendants()
    assert_nothing_partial(finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("marker", "delay"),
    [
        ("1/5", 0.0),
        ("4/5", 0.05),
        ("4/5", 0.6),
        ("4/5", 1.5),
        ("listening on", 0.0),
        ("listening on", 0.3),
        ("5/5", 0.5),
    ],
)
def test_an_interrupted_run_leaves_nothing(
    finished: Run, tmp_path: Path, marker: str, delay: float, number: signal.Signals
) -> None:
    finished.finish(timeout=900)
    run = Run(finished.work, tmp_path / "scratch", ("--json", str(tmp_path / "q.json")))
    run.start()
    try:
        interrupt_at(run, marker, delay, number)
    finally:
        run.kill()
    assert not (tmp_path / "q.json").exists()


def test_an_interruption_while_starting_up_is_silent(tmp_path: Path) -> None:
    run = Run(tmp_path / "work", tmp_path / "scratch")
    run.start()
    try:
        interrupt_at(run, "", 1.5, signal.SIGINT)
    finally:
        run.kill()
    assert not run.work.exists()


@pytest.mark.parametrize(("marker", "delay"), [("3/5", 0.1), ("3/5", 2.0), ("3/5", 5.0), ("3/5", 9.0)])
def test_an_interrupted_build_leaves_nothing(finished: Run, tmp_path: Path, marker: str, delay: float) -> None:
    finished.finish(timeout=900)
    work = tmp_path / "work"
    work.mkdir()
    trained = finished.work / "drafter"
    if trained.is_dir():
        os.symlink(trained, work / "drafter")
    run = Run(work, tmp_path / "scratch")
    run.start()
    try:
        interrupt_at(run, marker, delay, signal.SIGINT)
    finally:
        run.kill()


@pytest.mark.parametrize("delay", [3.0, 20.0, 45.0])
def test_an_interrupted_training_leaves_what_the_next_run_continues(tmp_path: Path, delay: float) -> None:
    run = Run(tmp_path / "work", tmp_path / "scratch", ("--train",))
    run.start()
    try:
        interrupt_at(run, "2/5", delay, signal.SIGINT)
    finally:
        run.kill()
    assert not (run.work / "drafter").exists()


def interrupt_at(run: Run, marker: str, delay: float, number: signal.Signals) -> None:
    """Signal the process group `delay` seconds after `marker` was shown, and check what is left."""
    run.wait_for(marker)
    time.sleep(delay)
    assert run.process.poll() is None, run.text
    os.killpg(run.process.pid, number)
    assert run.finish(timeout=40) == 130, run.text
    assert "Traceback" not in run.text
    assert not run.descendants(), run.text
    assert_nothing_partial(run)


def assert_nothing_partial(run: Run) -> None:
    """No temporary name is left, and every artifact is whole."""
    assert not list(run.scratch.glob("prism*")), list(run.scratch.iterdir())
    assert not list(Path("/dev/shm").glob(f"prism_trt_{run.process.pid}_*"))
    hidden = [path for path in run.work.rglob("*") if path.name.startswith(".")] if run.work.exists() else []
    assert not hidden
    engine = run.work / "engine"
    if engine.exists():
        read_engine_manifest(engine)
        verify_files(engine, json.loads((engine / "engine.json").read_text()))
