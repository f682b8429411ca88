"""What the file system refuses ends in one sentence, whoever was writing."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prism_trt.errors import PrismError
from prism_trt.storage import writing

TENSOR = {"a": torch.zeros(50_000)}


@contextmanager
def small_disk() -> Iterator[None]:
    """Files of this process, pytest's own output among them, cannot grow beyond 10 kB inside the block."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(200_000)),
        lambda path: save_file(TENSOR, path),
        lambda path: torch.save(TENSOR, path),
    ],
    ids=["python", "safetensors", "torch"],
)
def test_a_full_disk(write: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "shard"
    with (
        pytest.raises(PrismError, match=r"cannot write .*shard \(.*\): free space or write to a larger"),
        writing(path),
        small_disk(),
    ):
        write(path)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "shard"
    with pytest.raises(PrismError, match=r"\(No such file or directory\): check the disk"), writing(path):
        path.write_text("x")


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), writing(tmp_path):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(ValueError, match="x"), writing(tmp_path):
        raise ValueError("x")
