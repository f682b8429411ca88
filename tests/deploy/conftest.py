"""A tiny engine, its repository and a real Triton server over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prism_trt.build import build_engine
from prism_trt.deploy.repository import write_repository
from prism_trt.deploy.server import TritonServer
from prism_trt.drafter.checkpoint import save_drafter
from prism_trt.engines.loading import load_engine, load_engine_tokenizer
from prism_trt.engines.protocol import Engine
from prism_trt.target.loading import save_hf
from prism_trt.target.tokenizer import Tokenizer
from tests.tiny import tiny_drafter, tiny_target

SLOTS = 4
CONTEXT = 4096
TREE = "8/4/5"
"""The engine's own: what a planner would choose depends on the machine's load."""


@pytest.fixture(scope="session")
def engine_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    target = tiny_target(max_position_embeddings=CONTEXT)
    save_hf(target, root / "target")
    save_drafter(tiny_drafter(target), root / "drafter")
    build_engine(target=root / "target", drafter=root / "drafter", out=root / "engine", slots=SLOTS, context=CONTEXT)
    return root / "engine"


@pytest.fixture(scope="session")
def engine(engine_path: Path) -> Engine:
    """The served engine, in this process."""
    return load_engine(engine_path, threads=1)


@pytest.fixture(scope="session")
def tokenizer(engine_path: Path) -> Tokenizer:
    return load_engine_tokenizer(engine_path)


@pytest.fixture(scope="session")
def repository(engine_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serving") / "repository"
    return write_repository(engine_path, out, tree=TREE, threads=1, backlog=8)


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, grace=2.0) as running:
        yield running
