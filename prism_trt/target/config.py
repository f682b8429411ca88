"""Shape of a target, read from a Hugging Face config."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from prism_trt.config import RopeScaling, StrictModel, parse
from prism_trt.errors import PrismError

_FAMILIES = ("llama", "qwen2")


class TargetConfig(StrictModel):
    """Everything the LLaMA graph needs to know."""

    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2)
    rms_norm_eps: float = Field(gt=0)
    rope_theta: float = Field(gt=0)
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool
    qkv_bias: bool
    max_position_embeddings: int = Field(ge=1)
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @model_validator(mode="after")
    def _heads_divide(self) -> TargetConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        return self

    @classmethod
    def from_hf(cls, values: dict[str, Any], source: str) -> TargetConfig:
        """Read the fields of a Hugging Face ``config.json``.

        Raises:
            PrismError: naming `source` and what this graph does not implement, or a missing or invalid field.
        """
        family = values.get("model_type")
        if family not in _FAMILIES:
            raise PrismError(f"{source}: model type {family!r} is not supported: use one of {', '.join(_FAMILIES)}")
        _refuse_variants(values, source)
        try:
            heads = values["num_attention_heads"]
            fields = {
                "vocab_size": values["vocab_size"],
                "hidden_size": values["hidden_size"],
                "intermediate_size": values["intermediate_size"],
                "num_layers": values["num_hidden_layers"],
                "num_heads": heads,
                "num_kv_heads": values.get("num_key_value_heads") or heads,
                "head_dim": values.get("head_dim") or values["hidden_size"] // heads,
                "rms_norm_eps": values["rms_norm_eps"],
                "tie_word_embeddings": values.get("tie_word_embeddings", False),
                "qkv_bias": values.get("attention_bias", False) or family == "qwen2",
                "max_position_embeddings": values["max_position_embeddings"],
                "eos_token_ids": _ids(values.get("eos_token_id")),
                "bos_token_id": values.get("bos_token_id"),
                **_rope(values, source),
            }
        except KeyError as error:
            raise PrismError(f"{source} lacks {error}: it is not a complete model config") from None
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise PrismError(f"{source} has a value of the wrong kind ({error}): download the config again") from None
        return parse(cls, fields, source)

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face ``config.json`` that `from_hf` reads back to the same config."""
        rope = self.rope_scaling.model_dump() if self.rope_scaling else {"rope_type": "default"}
        return {
            "architectures": ["Qwen2ForCausalLM" if self.qkv_bias else "LlamaForCausalLM"],
            "model_type": "qwen2" if self.qkv_bias else "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {"rope_theta": self.rope_theta, **rope},
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "eos_token_id": list(self.eos_token_ids),
            "bos_token_id": self.bos_token_id,
        }


def _refuse_variants(values: dict[str, Any], source: str) -> None:
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise PrismError(f"{source}: activation {activation!r} is not supported: only silu is")
    if values.get("mlp_bias"):
        raise PrismError(f"{source}: mlp_bias is not supported")
    if values.get("attention_bias") and values.get("model_type") == "llama":
        raise PrismError(f"{source}: attention_bias of the llama family (a bias on o_proj too) is not supported")
    if values.get("use_sliding_window"):
        raise PrismError(f"{source}: sliding window attention is not supported")
    if values.get("num_experts") or values.get("num_local_experts"):
        raise PrismError(f"{source}: mixture-of-experts models are not supported")


def _rope(values: dict[str, Any], source: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, from `rope_parameters` (transformers 5) or the older two keys."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or values.get("rope_theta", 10000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    if rope.pop("partial_rotary_factor", None) not in (None, 1.0) or values.get("partial_rotary_factor", 1.0) != 1.0:
        raise PrismError(f"{source}: partial_rotary_factor is not supported: only full rotary embeddings are")
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise PrismError(f"{source}: rope scaling {kind!r} is not supported: only default and llama3 are")
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **rope}}


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)
