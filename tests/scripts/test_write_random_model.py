"""Random models can be read back, and their tensors differ."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from prism_trt.drafter.checkpoint import load_drafter
from prism_trt.target.loading import load_target

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "write_random_model.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("write_random_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_models_of_another_size_load(script: Any, tmp_path: Path) -> None:
    small = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_layers": 6}
    config = script.LLAMA_3_8B.model_copy(update={**small, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16})
    generator = torch.Generator().manual_seed(0)
    script.write_drafter(
        script.write_target(config, tmp_path / "target", generator), tmp_path / "drafter", 50, generator
    )
    target = load_target(tmp_path / "target", None)
    assert target.config == config and len(list((tmp_path / "target").glob("*.safetensors"))) > 2
    drafter = load_drafter(tmp_path / "drafter", target)
    assert drafter.config.num_modules == 2 and drafter.config.draft_vocab_size == 50
    matrices = [tensor for tensor in target.model.state_dict().values() if tensor.dim() > 1]
    assert all(float(tensor.abs().min()) >= 1 / 128 and float(tensor.abs().max()) < 1 / 32 for tensor in matrices)
    assert len({tensor.flatten()[:64].view(torch.int16).numpy().tobytes() for tensor in matrices}) == len(matrices)
    assert target.tokenizer.decode(target.tokenizer.encode("fox é")) == "fox é"
