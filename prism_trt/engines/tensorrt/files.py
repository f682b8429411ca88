"""The files of an engine for a GPU."""

from __future__ import annotations

TARGET, STEP, ROUND = "target", "step", "round"
"""The networks."""
BINDINGS = {"tensorrt-rtx": "tensorrt_rtx_bindings", "tensorrt": "tensorrt"}
"""Python packages of the runtimes."""
DRAFT_VOCAB = "draft_vocab.safetensors"


def plan_file(network: str) -> str:
    """File name of a network's compiled plan."""
    return f"{network}.plan"
