"""Files written tensor by tensor are what the safetensors library reads."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prism_trt.trtllm.layout import FP8, StoredTensor
from prism_trt.trtllm.streaming import write_safetensors


def test_the_library_reads_every_type_back(tmp_path: Path) -> None:
    values = {
        "odd": torch.arange(5).to(FP8),
        "transposed": torch.randn(3, 7, dtype=torch.float16).T,
        "part": torch.randn(4, 6, dtype=torch.bfloat16)[:, 2:5],
        "scale": torch.tensor([0.1]),
    }
    tensors = [StoredTensor(name, v.dtype, tuple(v.shape), lambda v=v: v) for name, v in values.items()]  # type: ignore[misc]
    size = write_safetensors(tmp_path / "file", tensors)
    assert size == (tmp_path / "file").stat().st_size
    read = load_file(tmp_path / "file")
    assert read.keys() == values.keys()
    for name, value in values.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name].float(), value.float())


def test_tensors_are_computed_one_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def compute(number: int) -> Callable[[], Tensor]:
        def computed() -> Tensor:
            assert not [reference for reference in alive if reference() is not None]
            tensor = torch.full((8,), float(number))
            alive.append(weakref.ref(tensor))
            return tensor

        return computed

    write_safetensors(tmp_path / "file", [StoredTensor(str(n), torch.float32, (8,), compute(n)) for n in range(4)])
    assert len(alive) == 4


def test_a_tensor_that_is_not_as_announced_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not as announced"):
        write_safetensors(tmp_path / "file", [StoredTensor("x", torch.float32, (3,), lambda: torch.zeros(4))])
