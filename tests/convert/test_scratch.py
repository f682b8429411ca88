"""Constants in mapped files."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from prism_trt.convert.scratch import scratch_files
from prism_trt.convert.target import emit_target
from prism_trt.errors import PrismError
from prism_trt.target.loading import load_target, save_hf
from tests.tiny import tiny_target


def mapped_file(value: torch.Tensor) -> str:
    """The file whose mapping holds the memory of `value`; empty for memory of the process's own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5) if line.count(" ") > 5 else (*line.split(), "")
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= value.data_ptr() < last:
            return name if name.startswith("/") else ""
    raise AssertionError("no mapping holds it")


def test_a_networks_constants_are_in_files_unless_the_models_are(trt: Any, tmp_path: Path) -> None:
    """Of an untied model stored in float16, only the fused matrices are copied; the copies' files have no name."""
    stored = tmp_path / "model"
    target = tiny_target(hidden_size=512, intermediate_size=1024, tie_word_embeddings=False, vocab_size=1100)
    target.model.half()
    save_hf(target, stored)
    model = load_target(stored, None).model
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    constants = emit_target(trt, model, None, 64, torch.float16, place=scratch_files(scratch, model)).constants
    plain = emit_target(trt, target.model, None, 64, torch.float16).constants
    assert constants.keys() == plain.keys()
    assert all(torch.equal(constants[name], plain[name]) for name in plain)
    assert not list(scratch.iterdir())
    places = {name: mapped_file(value) for name, value in constants.items() if value.nbytes > 1 << 20}
    assert {name for name, place in places.items() if place == str(stored / "model.safetensors")} == {
        "embedding",
        "head",
    }
    assert {name for name, place in places.items() if place.startswith(f"{scratch}/")} == {
        "layers.0.gate_up",
        "layers.1.gate_up",
    }
    assert len(places) == 4


def test_a_full_disk_ends_in_one_sentence(tmp_path: Path) -> None:
    place = scratch_files(tmp_path, torch.nn.Linear(2, 2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(PrismError, match=r"cannot write .*: free space"):
            place(torch.zeros(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
