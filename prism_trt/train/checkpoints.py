"""Checkpoints of a training run: what resumes it after a crash, bit for bit."""

from __future__ import annotations

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from prism_trt.errors import PrismError
from prism_trt.manifest import atomic_file
from prism_trt.train.stages import Stage

LATEST = "checkpoint.pt"


@dataclass
class RunState:
    """Everything an update depends on besides the configuration and the data."""

    signature: str
    """`run_signature` of the stage."""
    stage: int
    update: int
    """Updates done in the stage."""
    rows: int
    """Rows trained on since the beginning."""
    seconds: float
    """Training time since the beginning, interruptions excluded."""
    step_map: list[int]
    """Of the drafter; what `--step-map auto` chose stays chosen."""
    weights: dict[str, torch.Tensor]
    moments: dict[str, Any]
    """Of the optimizers; see `prism_trt.train.world.whole_moments`."""


def stage_file(stage: Stage) -> str:
    """File name of the checkpoint at the end of a stage."""
    return f"stage-{stage.number}-{stage.name}.pt"


def save_state(state: RunState, path: Path) -> None:
    """Write `state` atomically."""
    with atomic_file(path) as temporary:
        torch.save(asdict(state), temporary)


def load_state(path: Path) -> RunState:
    """Read what `save_state` wrote.

    Raises:
        PrismError: the file is damaged.
    """
    try:
        return RunState(**torch.load(path, weights_only=True))
    except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise PrismError(
            f"{path} is damaged ({type(error).__name__}): delete it to continue from an earlier stage"
        ) from None


def find_state(work: Path, stages: list[Stage], signatures: list[str]) -> RunState | None:
    """The furthest state in `work` that the run described by `signatures` (one per stage) passes through.

    The latest checkpoint is used when its stage and those before it have the same options; else the end of the last
    stage of which that holds, so that options of later stages can be changed without repeating earlier ones.

    Raises:
        PrismError: `work` holds states, but of another run.
    """
    names = [LATEST, *(stage_file(stage) for stage in reversed(stages))]
    present = [work / name for name in names if (work / name).is_file()]
    for path in present:
        state = load_state(path)
        if state.stage < len(signatures) and state.signature == signatures[state.stage]:
            return state
    if present:
        raise PrismError(
            f"{work} holds a run with other options, data or target: pass the same ones to continue, or another --work"
        )
    return None
