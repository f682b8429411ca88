"""What of the TensorRT runtime can be checked without a GPU: its calls against the bindings themselves."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prism_trt.engines.tensorrt import runtime
from prism_trt.errors import PrismError

CONFIG = """
[mypy]
follow_imports = skip
ignore_missing_imports = true
check_untyped_defs = true
[mypy-tensorrt_rtx_bindings.*]
follow_imports = silent
"""


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is missing: install the test extra")


@pytest.fixture(scope="module")
def stubs(trt: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Type stubs of the bindings, made from their signatures."""
    directory = tmp_path_factory.mktemp("stubs")
    command = ["stubgen", "--quiet", "--inspect-mode", "-m", "tensorrt_rtx_bindings.tensorrt_rtx", "-o", str(directory)]
    subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]], check=True)
    stub = directory / "tensorrt_rtx_bindings" / "tensorrt_rtx.pyi"
    stub.write_text(parsable(stub.read_text()))
    return directory


def parsable(text: str) -> str:
    """A stub without the lines that are no Python (not every signature could be written down) or hide its own types."""
    lines = [line for line in text.splitlines() if not line.startswith(("bool:", "bool ="))]
    while True:
        try:
            ast.parse("\n".join(lines))
        except SyntaxError as error:
            assert error.lineno is not None
            del lines[error.lineno - 1]
        else:
            return "\n".join(lines)


def check_types(source: str, stubs: Path, directory: Path) -> str:
    """What mypy says of `source`; empty when it finds nothing."""
    (directory / "mypy.ini").write_text(CONFIG)
    (directory / "checked.py").write_text(source)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "checked.py", "--no-error-summary"]
    environment = {**os.environ, "MYPYPATH": str(stubs)}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert not done.stderr
    return "\n".join(line for line in done.stdout.splitlines() if line.startswith("checked.py"))  # not the stubs'


def test_the_runtime_calls_what_the_bindings_have(stubs: Path, tmp_path: Path) -> None:
    source = Path(runtime.__file__).read_text()
    assert check_types(source, stubs, tmp_path) == ""
    for right, wrong in [("set_device_memory(", "set_memory("), ("tuple(tensor.shape)", "1"), ("_v2,", "_v9,")]:
        assert "error:" in check_types(source.replace(right, wrong, 1), stubs, tmp_path), right


def test_types_of_tensors(trt: Any) -> None:
    for name, dtype in [("HALF", torch.float16), ("BF16", torch.bfloat16), ("FLOAT", torch.float32)]:
        assert runtime.torch_type(trt, getattr(trt.DataType, name)) == dtype


def test_a_damaged_plan_is_refused(trt: Any, tmp_path: Path) -> None:
    plan = tmp_path / "target.plan"
    plan.write_bytes(b"not a plan" * 100)
    loader = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    with pytest.raises(PrismError, match=r"cannot load .*target\.plan: build the engine again"):
        runtime.CompiledPlan(trt, loader, plan, torch.device("cpu"))
