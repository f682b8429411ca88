"""What every kind of engine is built from."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

import prism_trt
from prism_trt.config import TreeShape
from prism_trt.drafter.model import Drafter
from prism_trt.quantize.report import Quantized
from prism_trt.quantize.scales import UNQUANTIZED, Scales
from prism_trt.target.loading import Target


@dataclass(frozen=True)
class BuildPlan:
    """Checked input of a build."""

    directory: Path
    """Where files are written."""
    target: Target
    drafter: Drafter | None
    tree: TreeShape
    """Default draft tree."""
    context: int
    """K/V entries per request."""
    slots: int
    """Concurrent requests."""
    dtype: str | None
    """What was asked for, if anything was."""
    quantized: Quantized | None = None
    """None: every matrix has the networks' type."""

    @property
    def scales(self) -> Scales:
        """Of the matrices to quantise."""
        return UNQUANTIZED if self.quantized is None else self.quantized.scales


def own_versions() -> dict[str, str]:
    """Versions that every manifest records."""
    return {"prism_trt": prism_trt.__version__, "python": platform.python_version(), "torch": torch.__version__}
