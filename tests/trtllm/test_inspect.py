"""`inspect` on a checkpoint for TensorRT-LLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prism_trt.inspect.artifacts import inspect_path
from prism_trt.inspect.report import Report
from prism_trt.manifest import own_fields, read_manifest, write_manifest
from prism_trt.target.loading import save_hf
from prism_trt.trtllm.export import KIND, MANIFEST_FILE, export_checkpoint
from prism_trt.trtllm.layout import CheckpointOptions, LinearScales, linear_names
from tests.tiny import tiny_target
from tests.trtllm.test_export import CHAIN, DEPTH, make

STEP_MAP = (0, 1, 2)


def write(directory: Path, ranks: int = 1, fp8: bool = False) -> Path:
    made = make(STEP_MAP)
    target, nets = linear_names(made[0].config.num_layers, DEPTH)
    scales = {name: LinearScales(weight=0.01, activation=0.1) for name in target | nets} if fp8 else None
    export_checkpoint(*made, directory / "checkpoint", CheckpointOptions(tree=CHAIN, ranks=ranks), scales)
    return directory / "checkpoint"


def problems(report: Report) -> list[str]:
    return [check.problem for check in report.checks if check.problem is not None]


@pytest.mark.parametrize(("ranks", "fp8"), [(1, True), (2, False)])
def test_a_sound_checkpoint(tmp_path: Path, ranks: int, fp8: bool) -> None:
    checkpoint = write(tmp_path, ranks, fp8)
    save_hf(make(STEP_MAP)[0], tmp_path / "target")
    save_hf(tiny_target(max_position_embeddings=256), tmp_path / "other")
    report = inspect_path(checkpoint, tmp_path / "target")
    assert (report.kind, problems(report)) == (KIND, [])
    assert report.facts["EagleNets"] == f"{DEPTH}, modules [0, 1, 2, 2]"
    assert report.facts["trtllm-build --model_cls_file"] == "needed"
    assert {f"tensors of rank {rank}" for rank in range(ranks)} <= {check.name for check in report.checks}
    (found,) = problems(inspect_path(checkpoint, tmp_path / "other"))
    assert "pass its own" in found


def reseal(checkpoint: Path, **fields: Any) -> None:
    """A manifest whose hashes fit."""
    known = own_fields(json.loads((checkpoint / MANIFEST_FILE).read_text()))
    write_manifest(checkpoint, MANIFEST_FILE, KIND, known | fields)


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def act(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / "rank0.safetensors")
        change(tensors)
        save_file(tensors, checkpoint / "rank0.safetensors")
        reseal(checkpoint)

    return act


def change_config(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    change(config)
    (checkpoint / "config.json").write_text(json.dumps(config))
    reseal(checkpoint)


def flip(checkpoint: Path) -> None:
    data = bytearray((checkpoint / "rank0.safetensors").read_bytes())
    data[-1] ^= 0x40
    (checkpoint / "rank0.safetensors").write_bytes(data)


FC = "eagle_nets.1.drafter.fc.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "is corrupted"),
        (lambda c: (c / "rank0.safetensors").unlink(), "is missing"),
        (change_tensors(lambda t: t.pop(FC)), f"{FC} is missing, not [64, 128]"),
        (change_tensors(lambda t: t.update({FC: t[FC].T.contiguous()})), f"{FC} is [128, 64], not [64, 128]"),
        (change_tensors(lambda t: t.update(more=torch.zeros(1))), "more is [1], not expected"),
        (change_tensors(lambda t: t[FC].fill_(torch.inf)), f"{FC} holds infinite or undefined values"),
        (lambda c: reseal(c, step_map=[0, 1, 1, 1]), "config.json has prism_step_map [0, 1, 2, 2] and the manifest"),
        (lambda c: reseal(c, options={"tree": {}, "dtype": "int8"}), "dtype"),
        (lambda c: reseal(c, step_map=None), "step_map"),
        (lambda c: change_config(c, lambda config: config.pop("eagle_net_config")), "lacks 'eagle_net_config'"),
    ],
)  # fmt: skip
def test_damage_is_found(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    checkpoint = write(tmp_path)
    assert read_manifest(checkpoint, MANIFEST_FILE, KIND)["step_map"] == [0, 1, 2, 2]
    damage(checkpoint)
    report = inspect_path(checkpoint)
    assert not report.sound
    assert message in problems(report)[0]
