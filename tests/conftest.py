"""Fixtures shared by all tests."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from prism_trt.target.loading import Target, load_target
from prism_trt.target.smollm2 import find_smollm2


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(1)  # tiny tensors gain nothing, and waiting threads cost much on a busy machine


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    # Shells start background jobs with this signal ignored, and the processes that tests start would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    return find_smollm2()


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Target:
    """SmolLM2-135M-Instruct in float32, loaded once."""
    return load_target(smollm2_path)
