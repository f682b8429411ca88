"""The TensorRT-RTX bindings: enough to emit networks and to build plans on a machine without a GPU."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is missing: install the test extra")
