from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.train.synthetic import write_target_and_cache


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums then have one order, so that runs can be compared bit by bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def trained_on(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny target in `target` and its answers to 40 prompts in `cache`."""
    directory = tmp_path_factory.mktemp("training")
    write_target_and_cache(directory)
    return directory
