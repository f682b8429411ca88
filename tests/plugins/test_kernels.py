"""The kernels' results, in Triton's interpreter, against float64 references."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.plugins.cases import (
    AttentionCase,
    LinearCase,
    assert_close,
    attention_cases,
    expected_attention,
    expected_linear,
    linear_cases,
)

ROOT = Path(__file__).parent.parent.parent


def interpret(path: Path, *mode: str) -> subprocess.CompletedProcess[str]:
    """Run `tests.plugins.interpreted` in its own process, so that no other test sees the interpreter."""
    command = [sys.executable, "-m", "tests.plugins.interpreted", str(path), *mode]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("interpreted") / "outputs.pt"
    done = interpret(path)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.mark.parametrize("case", linear_cases(), ids=lambda case: case.name)
def test_step_linear_equals_the_float64_reference(case: LinearCase, outputs: dict[str, Any]) -> None:
    actual = outputs[case.name]["y"]
    assert_close(actual, expected_linear(**case.arguments()), case.dtype)


@pytest.mark.parametrize("case", attention_cases(), ids=lambda case: case.name)
def test_pool_attention_equals_the_float64_reference(case: AttentionCase, outputs: dict[str, Any]) -> None:
    expected, k_pool, v_pool = expected_attention(**case.arguments())
    assert_close(outputs[case.name]["y"], expected, case.dtype)
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):  # bit for bit, the entries beside it included
        assert torch.equal(outputs[case.name][name].view(torch.int16), pool.view(torch.int16))


def test_a_module_that_no_token_uses_is_not_read(tmp_path: Path) -> None:
    done = interpret(tmp_path / "y.pt", "guarded")
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt"), torch.full((3, 16), 256, dtype=torch.float16))


def test_reading_the_guarded_module_would_be_noticed(tmp_path: Path) -> None:
    assert interpret(tmp_path / "y.pt", "trapped").returncode == -signal.SIGSEGV
