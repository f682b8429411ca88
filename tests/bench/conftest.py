from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.engines import build


@pytest.fixture(scope="session")
def engine_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny engine, built once."""
    return build(tmp_path_factory.mktemp("tiny"))
