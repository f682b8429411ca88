from __future__ import annotations

import errno
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from prism_trt.config import TrainConfig
from prism_trt.errors import PrismError
from prism_trt.progress import progress
from prism_trt.train import observers
from prism_trt.train.loop import Measurement, UpdateReport
from prism_trt.train.observers import OverfittingObserver, ProgressObserver, TensorBoardObserver
from prism_trt.train.simulate import SimulatedAcceptance
from prism_trt.train.stages import stages
from tests.train.test_app import arguments

STAGE = stages(TrainConfig())[0]
SIMULATED = SimulatedAcceptance(50, (0.2,) * 5, (0.4,) * 5, 1.2, 1.5, agreement=0.5)
NOTHING = SimulatedAcceptance(0, (0.0,) * 5, (0.0,) * 5, 1.0, 1.0, agreement=0.5)


def report(agreement: float) -> UpdateReport:
    return UpdateReport(STAGE, 1, 100, 1.0, 1e-3, 1.0, Measurement(1.0, 1.0, (1.0,), (agreement,)))


@pytest.mark.parametrize(("trained", "warned"), [(0.6, False), (0.7, True)])
def test_overfitting_is_told_from_the_same_quantity_on_both_sides(trained: float, warned: bool) -> None:
    """Training measures the share of first choices that are the target's in the draft vocabulary, and not `top1`."""
    said: list[str] = []
    observer = OverfittingObserver(said.append)
    observer.updated(report(trained))
    observer.simulated(STAGE, 500, SIMULATED)
    assert bool(said) == warned
    if warned:
        assert "in 70% of its training data but in 50% of the answers held back" in said[0]
        assert "length 1.20" in said[0]


def test_what_was_not_measured_is_not_warned_about() -> None:
    said: list[str] = []
    observer = OverfittingObserver(said.append)
    observer.updated(report(0.9))
    observer.simulated(STAGE, 500, replace(NOTHING, agreement=None))
    assert not said


def test_no_length_is_shown_where_no_answer_is_long_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = TensorBoardObserver(tmp_path)
    with progress("training") as reporter:
        for observer in (ProgressObserver(reporter), board):
            observer.started([STAGE], 0, 0)
            observer.simulated(STAGE, 500, NOTHING)
    board.close()
    shown = capsys.readouterr().err
    assert "not measured, because no answer held back has 5 tokens" in shown and "1.000" not in shown
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == []


def test_a_short_step_map_serves_the_later_steps_with_its_last_module(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training") as reporter:
        ProgressObserver(reporter).mapped((0, 1), SIMULATED)
    assert "step 0 is right on 20.0%: module 0" in (shown := capsys.readouterr().err)
    assert "step 4 is right on 20.0%: module 1" in shown


def test_logs_that_cannot_be_written_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    board = TensorBoardObserver(tmp_path)
    board.started([STAGE], 0, 0)
    assert board._writer is not None
    monkeypatch.setattr(board._writer, "add_scalar", full)
    with pytest.raises(PrismError, match=r"cannot write .*No space left on device"):
        board.simulated(STAGE, 500, SIMULATED)
    monkeypatch.setattr(observers, "SummaryWriter", full)
    with pytest.raises(PrismError, match="No space left on device"):
        TensorBoardObserver(tmp_path).started([STAGE], 0, 0)


def test_a_disk_that_fills_with_logs_leaves_no_traceback(trained_on: Path, tmp_path: Path) -> None:
    """The writer's own thread meets the error first."""
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); "
        "import runpy; runpy.run_module('prism_trt.train', run_name='__main__')"
    )
    options = arguments(trained_on, out=str(tmp_path / "out"), log_every="1", save_every="1000")
    done = subprocess.run([sys.executable, "-c", limited, *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: cannot write" in done.stderr.splitlines()[-1]
