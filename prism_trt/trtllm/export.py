"""Write target and drafter as a checkpoint of TensorRT-LLM 1.2, in the layout of its EAGLE models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prism_trt.config import DrafterConfig
from prism_trt.drafter.checkpoint import weights_sha256
from prism_trt.drafter.model import Drafter
from prism_trt.errors import PrismError
from prism_trt.manifest import atomic_directory, has_any, write_manifest
from prism_trt.target.config import TargetConfig
from prism_trt.target.loading import Target
from prism_trt.trtllm.description import checkpoint_config
from prism_trt.trtllm.layout import CheckpointOptions, LinearScales, quantizes_nets, rank_tensors, require_scales
from prism_trt.trtllm.selection import ModuleStack
from prism_trt.trtllm.streaming import write_safetensors

CONFIG_FILE, MANIFEST_FILE, KIND = "config.json", "prism_trt.json", "TensorRT-LLM checkpoint"


@dataclass(frozen=True)
class WrittenCheckpoint:
    """What `export_checkpoint` wrote."""

    bytes_per_rank: int
    needs_model_class: bool
    """Whether ``trtllm-build`` must be given `prism_trt.trtllm.model_class` for the drafts to be right."""


def export_checkpoint(
    target: Target,
    drafter: Drafter,
    directory: Path,
    options: CheckpointOptions,
    scales: Mapping[str, LinearScales] | None = None,
    overwrite: bool = False,
) -> WrittenCheckpoint:
    """Write ``config.json``, ``rank{r}.safetensors`` and a manifest atomically.

    Weights are converted and split one at a time, so that beside the loaded target there is never a second copy.

    Args:
        scales: FP8 scales by the name of the linear layer (``transformer.layers.0.mlp.fc``), for all of the target and
            all or none of the EagleNets; None stores every layer in `options.dtype`.

    Raises:
        PrismError: the layout cannot hold this drafter or target, the ranks cannot share them, a weight does not fit
            the dtype, `scales` do not match, or `directory` exists, is not empty, and `overwrite` is false.
    """
    _require_layout(target.config, drafter.config)
    _require_ranks(target.config, drafter.config, options.ranks)
    scales = scales or {}
    if scales:
        require_scales(scales, target.config.num_layers, options.tree.depth)
    step_map = tuple(drafter.module_of_step(step) for step in range(options.tree.depth))
    fp8, fp8_nets = bool(scales), quantizes_nets(scales)
    config = checkpoint_config(target.config, drafter.config, step_map, options, fp8, fp8_nets)
    with atomic_directory(directory, overwrite, has_any(MANIFEST_FILE)) as temporary:
        for rank in range(options.ranks):
            file = temporary / f"rank{rank}.safetensors"
            size = write_safetensors(file, rank_tensors(target, drafter, options, rank, scales))
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        write_manifest(
            temporary,
            MANIFEST_FILE,
            KIND,
            {
                "options": options.model_dump(mode="json"),
                "step_map": step_map,
                "target_fingerprint": target.fingerprint,
                "drafter_sha256": weights_sha256(drafter),
            },
        )
    return WrittenCheckpoint(size, ModuleStack.of(step_map).needs_selection)


def _require_layout(target: TargetConfig, drafter: DrafterConfig) -> None:
    if reason := _misfit(target, drafter):
        raise PrismError(f"this drafter cannot be written for TensorRT-LLM, because {reason}")


def _misfit(target: TargetConfig, drafter: DrafterConfig) -> str | None:
    """Why the layout cannot hold this pair, and what to do about it."""
    if drafter.kind == "standard":
        return "a standard drafter is a language model of its own: train one of another kind"
    if drafter.features == "multi":
        return "an EagleNet is fed the last hidden state and this drafter several, fused: train with --features last"
    if drafter.num_layers > 1:
        return f"EagleNets are written with one layer and its modules have {drafter.num_layers}: train with --layers 1"
    if drafter.draft_vocab_size is not None:
        return (
            f"an EagleNet predicts the whole vocabulary and this drafter {drafter.draft_vocab_size} tokens of it: "
            "train with --draft-vocab-size 0"
        )
    if target.qkv_bias:
        return "its target's attention has biases, and TensorRT-LLM runs EAGLE on LLaMA alone: use a LLaMA target"
    # Both share one K/V pool, and one table of rotary angles that is made from the target's config.
    for field in ("num_kv_heads", "head_dim", "rope_theta", "rope_scaling"):
        theirs, ours = getattr(target, field), getattr(drafter, field)
        if theirs != ours:
            return (
                f"TensorRT-LLM gives an EagleNet the target's {field}, {theirs}, and this drafter has {ours}: train a "
                "drafter for this target"
            )
    return None


def _require_ranks(target: TargetConfig, drafter: DrafterConfig, ranks: int) -> None:
    for name, model in (("target", target), ("drafter", drafter)):
        for field in ("num_heads", "num_kv_heads", "hidden_size", "intermediate_size"):
            size = getattr(model, field)
            if size % ranks:
                raise PrismError(f"{ranks} ranks cannot share the {name}'s {field} of {size}: pass --ranks 1")
