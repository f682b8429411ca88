"""The files of an engine for a GPU, and how the tensors of its K/V pool pair up."""

from __future__ import annotations

TARGET, STEP, ROUND = "target", "step", "round"
"""The networks."""
BINDINGS = {"tensorrt-rtx": "tensorrt_rtx_bindings", "tensorrt": "tensorrt"}
"""Python packages of the runtimes."""
DRAFT_VOCAB = "draft_vocab.safetensors"
KERNELS = "kernels"
"""Directory of compiled plugins; TensorRT copies them into the plans."""


def plan_file(network: str) -> str:
    """File name of a network's compiled plan."""
    return f"{network}.plan"


def before_update(name: str) -> str:
    """The input that the output `name` of a network updates, where it is a part of the K/V pool; otherwise `name`."""
    return name.removesuffix(".updated")
