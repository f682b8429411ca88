"""The ``config.json`` of a checkpoint, as ``EagleConfig`` of TensorRT-LLM 1.2 reads it (``models/eagle/config.py``)."""

from __future__ import annotations

from typing import Any

from prism_trt.config import DrafterConfig, RopeScaling
from prism_trt.target.config import TargetConfig
from prism_trt.trtllm.layout import CheckpointOptions

STEP_MAP_KEY = "prism_step_map"
"""Module of each EagleNet; TensorRT-LLM keeps keys that it does not know, and the model class reads this one."""

DEFAULT_EXCLUDES = (
    "*lm_head",
    "*router",
    "*vocab_embedding",
    "*position_embedding",
    "*block_embedding",
    "*shared_expert_gate",
)
"""What TensorRT-LLM never quantises unless a list says otherwise; a list replaces them."""


def checkpoint_config(
    target: TargetConfig,
    drafter: DrafterConfig,
    step_map: tuple[int, ...],
    options: CheckpointOptions,
    fp8: bool,
    fp8_nets: bool,
) -> dict[str, Any]:
    """The fields of ``config.json``.

    Args:
        step_map: module of each of the tree's steps.
        fp8: whether the target's linear layers are stored in FP8.
        fp8_nets: whether those of the EagleNets are too.
    """
    tree = options.tree
    net = {
        "architecture": "LlamaForCausalLM",
        **_shape(target, drafter, options),
        "num_hidden_layers": drafter.num_layers,
        "quantization": _quantization(fp8_nets, fp8_nets),
    }
    return {
        "architecture": "EagleForCausalLM",
        **_shape(target, target, options),
        "num_hidden_layers": target.num_layers,
        "quantization": _quantization(fp8, fp8_nets),
        "num_eagle_layers": tree.depth,
        "max_draft_len": tree.size - 1,
        "max_non_leaves_per_layer": tree.width,
        "eagle_net_config": net,
        STEP_MAP_KEY: list(step_map),
    }


def _shape(target: TargetConfig, model: TargetConfig | DrafterConfig, options: CheckpointOptions) -> dict[str, Any]:
    """What the target and an EagleNet both state, of `model`."""
    return {
        "dtype": options.dtype,
        "logits_dtype": "float32",
        "vocab_size": target.vocab_size,
        "max_position_embeddings": target.max_position_embeddings,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_size": model.head_dim,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "norm_epsilon": model.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": model.rope_theta,
        "rotary_scaling": _rotary_scaling(model.rope_scaling),
        "mapping": {"world_size": options.ranks, "tp_size": options.ranks, "pp_size": 1},
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
    }


def _rotary_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """All the numbers; TensorRT-LLM's own converter keeps the type alone, and its defaults then replace the rest."""
    return None if scaling is None else {"type": scaling.rope_type, **scaling.model_dump()}


def _quantization(fp8: bool, fp8_nets: bool) -> dict[str, Any]:
    if not fp8:
        return {"quant_algo": None, "kv_cache_quant_algo": None}
    excludes = [*DEFAULT_EXCLUDES, *([] if fp8_nets else ["eagle_nets.*"])]
    return {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": excludes}
