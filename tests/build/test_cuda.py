"""Engines for any NVIDIA GPU: written and checked without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prism_trt.build import build_engine
from prism_trt.config import TreeShape
from prism_trt.drafter.checkpoint import load_drafter, save_drafter
from prism_trt.engines.cuda_graphs import GraphedTorchEngine
from prism_trt.engines.loading import DRAFTER_DIRECTORY, TARGET_DIRECTORY, load_engine, load_engine_tokenizer
from prism_trt.engines.manifest import EngineManifest
from prism_trt.engines.protocol import Engine
from prism_trt.engines.recordings import record_nothing
from prism_trt.errors import PrismError
from prism_trt.speculative.decoder import Request, generate
from prism_trt.target.loading import load_target, save_hf
from tests.tiny import tiny_drafter, tiny_target

TREE = TreeShape.parse("8/3/3")


def built(directory: Path, dtype: str | None) -> EngineManifest:
    target = tiny_target()
    save_hf(target, directory / "target")
    save_drafter(tiny_drafter(target), directory / "drafter")
    manifest = build_engine(
        profile="cuda",
        target=directory / "target",
        drafter=directory / "drafter",
        out=directory / "engine",
        tree=TREE,
        context=96,
        slots=2,
        dtype=dtype,
    )
    assert isinstance(manifest, EngineManifest)
    return manifest


def decode(engine: Engine, tree: TreeShape | None) -> list[list[int]]:
    return [result.tokens for result in generate(engine, [Request([5, 6, 7 + n], 20, tree=tree) for n in range(3)])]


def test_an_engine_for_any_gpu(tmp_path: Path) -> None:
    manifest = built(tmp_path, None)
    assert (manifest.runtime, manifest.dtype, manifest.profile) == ("torch-cuda", "bfloat16", "cuda")
    engine = tmp_path / "engine"
    target = load_target(engine / TARGET_DIRECTORY, None)
    drafter = load_drafter(engine / DRAFTER_DIRECTORY, target, torch.bfloat16)
    assert target.model.head_weight.dtype == torch.bfloat16
    assert load_engine_tokenizer(engine).fingerprint == target.tokenizer.fingerprint
    recorded = GraphedTorchEngine(target, drafter, manifest.limits, torch.device("cpu"), torch.float32, record_nothing)
    assert decode(recorded, TREE) == decode(recorded, None)


def test_it_is_refused_where_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    built(tmp_path, "float32")
    with pytest.raises(PrismError, match="runs on an NVIDIA GPU, but torch finds none here"):
        load_engine(tmp_path / "engine")


@pytest.mark.gpu
def test_it_decodes_the_targets_tokens(tmp_path: Path) -> None:
    manifest = built(tmp_path, "float32")
    assert manifest.latency_ms is not None and manifest.latency_ms.forward[1][1] > 0
    engine = load_engine(tmp_path / "engine")
    assert engine.device.type == "cuda" and engine.default_tree == TREE
    assert decode(engine, TREE) == decode(engine, None)
