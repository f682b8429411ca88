"""Write a drafter of one module in EAGLE's layout, which HASS and servers of EAGLE-1/2 drafters read too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prism_trt.drafter.foreign.layouts import EAGLE
from prism_trt.drafter.foreign.reading import CONFIG_FILE, SAFETENSORS_FILE, TORCH_FILE
from prism_trt.drafter.model import Drafter
from prism_trt.errors import PrismError
from prism_trt.manifest import atomic_directory, has_only
from prism_trt.target.loading import Target


def export_eagle(
    drafter: Drafter,
    target: Target,
    directory: Path,
    dtype: torch.dtype = torch.float16,
    safetensors: bool = False,
    overwrite: bool = False,
) -> None:
    """Write ``config.json`` and ``pytorch_model.bin`` (or ``model.safetensors``) atomically.

    Raises:
        PrismError: EAGLE's layout cannot hold this drafter, a weight does not fit `dtype`, or `directory` exists, is
            not empty, and `overwrite` is false.
    """
    _require_eagle(drafter, target)
    tensors = {EAGLE.translate(name): value for name, value in drafter.state_dict().items()}
    tensors["embed_tokens.weight"] = target.model.model.embed_tokens.weight
    tensors = {name: _converted(name, value, dtype) for name, value in tensors.items()}
    with atomic_directory(directory, overwrite, has_only(CONFIG_FILE, SAFETENSORS_FILE, TORCH_FILE)) as temporary:
        if safetensors:
            save_file(tensors, temporary / SAFETENSORS_FILE, metadata={"format": "pt"})
        else:
            torch.save(tensors, temporary / TORCH_FILE)
        (temporary / CONFIG_FILE).write_text(json.dumps(_eagle_config(drafter, target, dtype), indent=2) + "\n")


def _require_eagle(drafter: Drafter, target: Target) -> None:
    config = drafter.config
    reason = None
    if config.kind == "standard":
        reason = "a standard drafter is a language model of its own"
    elif config.num_modules > 1:
        reason = f"EAGLE has one module for all steps and this drafter has {config.num_modules}"
    elif config.features == "multi":
        reason = "EAGLE is fed the last hidden state and this drafter several, fused"
    elif config.num_heads * config.head_dim != config.hidden_size:
        reason = (
            f"EAGLE's heads divide the hidden size, and {config.num_heads} of {config.head_dim} are not "
            f"{config.hidden_size}"
        )
    if reason is not None:
        raise PrismError(f"this drafter cannot be exported to EAGLE's layout, because {reason}")


def _converted(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    converted = value.detach().to("cpu", dtype, copy=True).contiguous()  # a view would bring its whole file along
    if not bool(converted.isfinite().all()):
        raise PrismError(f"{name} has values that are not finite in {dtype}: pass --dtype bfloat16 or float32")
    return converted


def _eagle_config(drafter: Drafter, target: Target, dtype: torch.dtype) -> dict[str, Any]:
    """What ``EConfig.from_pretrained`` and EAGLE's constructor read (``eagle/model/configs.py``, ``ea_model.py``)."""
    config, model = drafter.config, target.config
    eos = model.eos_token_ids
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling.model_dump() if config.rope_scaling else None,
        "max_position_embeddings": model.max_position_embeddings,
        "vocab_size": model.vocab_size,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        # EAGLE takes a missing key for true.
        "bias": config.fc_bias,
    }
