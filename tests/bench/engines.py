"""Tiny engine directories whose drafter often, but not always, agrees with its target."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from prism_trt.build import build_engine
from prism_trt.config import TreeShape
from prism_trt.drafter.checkpoint import save_drafter
from prism_trt.drafter.model import Drafter
from prism_trt.target.loading import Target, save_hf
from tests.tiny import tiny_drafter, tiny_target

TREE = TreeShape(depth=3, width=3, size=8)


def agreeing_models(noise: float = 0.0) -> tuple[Target, Drafter]:
    """A target whose layers change little, so that its next token is nearly a function of the last, and a drafter that
    passes the last token's embedding through, disturbed by `noise`."""
    target = tiny_target(3, tie_word_embeddings=False)
    drafter = tiny_drafter(target, draft_vocab_size=280)
    with torch.no_grad():
        for name, parameter in target.model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(0.05)
        for name, parameter in drafter.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
            elif ".fc." in name:
                parameter.zero_()
                parameter[:, : parameter.shape[0]] = torch.eye(parameter.shape[0])
                parameter.add_(noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return target, drafter


def save_models(directory: Path, noise: float = 0.0) -> tuple[Path, Path]:
    """Save `agreeing_models` as `directory/target` and `directory/drafter`."""
    target, drafter = agreeing_models(noise)
    save_hf(target, directory / "target")
    save_drafter(drafter, directory / "drafter")
    return directory / "target", directory / "drafter"


@contextmanager
def no_compiler() -> Iterator[None]:
    """Builds inside this context use torch, which takes a second where compiling takes many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        patch.delenv("CXX", raising=False)
        yield


def build(directory: Path, noise: float = 0.0, with_drafter: bool = True) -> Path:
    """Build an engine of `agreeing_models` as `directory/engine`."""
    target, drafter = save_models(directory, noise)
    build_engine(
        profile="cpu",
        target=target,
        drafter=drafter if with_drafter else None,
        out=directory / "engine",
        tree=TREE,
        context=256,
        slots=2,
        say=lambda text: None,
    )
    return directory / "engine"
