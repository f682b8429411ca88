"""Ctrl-C waits for imports to end."""

from __future__ import annotations

import importlib
import signal
import sys
import time
from pathlib import Path

import pytest

from prism_trt.interrupts import interrupts_outside_imports


def test_an_import_is_finished_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "interrupted_module.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(0.1)\nfinished = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt), interrupts_outside_imports():
        importlib.import_module("interrupted_module")
        time.sleep(60)
    assert sys.modules.pop("interrupted_module").finished
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_otherwise_it_comes_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_outside_imports():
        signal.raise_signal(signal.SIGINT)


def test_processes_that_ignore_it_go_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_outside_imports():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
