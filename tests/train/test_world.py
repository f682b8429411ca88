"""Runs of several processes give the drafter of one process, and continue each other's checkpoints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

OPTIONS = {
    "draft-vocab-size": 200,
    "one-step-updates": 4,
    "alignment-updates": 3,
    "tuning-updates": 4,
    "rows-per-update": 128,
    "hold-back": 6,
    "save-every": 2,
    "compute": "float32",
    "features": "multi",
    "threads": 1,
    "device": "cpu",
}


def train(data: Path, directory: Path, processes: int, *extra: str) -> dict[str, torch.Tensor]:
    """Train with torchrun as a user does; returns the drafter's tensors."""
    arguments = [f"--{name}={value}" for name, value in OPTIONS.items()]
    launcher = [sys.executable, "-m"]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher += ["torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}", "-m"]
    command = [
        *(*launcher, "prism_trt.train", f"--target={data / 'target'}", f"--cache={data / 'cache'}"),
        *(f"--out={directory / 'drafter'}", f"--work={directory / 'work'}", "--overwrite", *arguments, *extra),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return load_file(directory / "drafter" / "model.safetensors")


def dry_run(*options: str) -> str:
    """Everything that two processes print."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "prism_trt.train"),
        *(*(f"--{name}={value}" for name, value in OPTIONS.items()), "--dry-run", *options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_first_process_alone_measures_a_dry_run(trained_on: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {i} words"}) + "\n" for i in range(24)))
    target, out = f"--target={trained_on / 'target'}", f"--out={tmp_path / 'drafter'}"
    on_cache = dry_run(target, out, f"--cache={trained_on / 'cache'}")
    planned = dry_run(target, out, f"--cache={tmp_path / 'cache'}", f"--data={prompts}")
    for said in (on_cache, planned):
        assert said.count("trained parameters") == said.count("stage tuning") == 1
        assert "on 1 process, which the 2 of this run share" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl"]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal but for the order of sums, which Adam's division by small second moments magnifies."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=3e-4)


@pytest.fixture(scope="module")
def alone(trained_on: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return train(trained_on, tmp_path_factory.mktemp("alone"), 1)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_drafter_of_one(
    trained_on: Path, tmp_path: Path, alone: dict[str, torch.Tensor], parallel: str
) -> None:
    assert_same(train(trained_on, tmp_path, 2, f"--parallel={parallel}", "--rows-per-pass=40"), alone)


def test_a_checkpoint_continues_in_another_number_of_processes(
    trained_on: Path, tmp_path: Path, alone: dict[str, torch.Tensor]
) -> None:
    """Stage one_step and alignment in two sharded processes, tuning in one."""
    train(trained_on, tmp_path, 2, "--parallel=fsdp", "--tuning-updates=2")
    assert (tmp_path / "work" / "stage-1-alignment.pt").is_file()
    assert_same(train(trained_on, tmp_path, 1), alone)
