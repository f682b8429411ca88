"""Typed, validated configurations. Unknown keys are rejected everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prism_trt.errors import PrismError


class StrictModel(BaseModel):
    """Base of all configs: immutable, unknown keys rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Config = TypeVar("Config", bound=StrictModel)


def parse(model: type[Config], values: dict[str, Any], source: str) -> Config:
    """Validate `values` as `model`.

    Raises:
        PrismError: naming `source`, the first offending key and the reason.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise PrismError(f"{source}: {key}: {first['msg']}") from None


def parse_json_file(model: type[Config], path: Path) -> Config:
    """Read `path` as JSON and validate it as `model`.

    Raises:
        PrismError: the file is missing, not a JSON object, or invalid.
    """
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        raise PrismError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise PrismError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise PrismError(f"{path} must hold a JSON object")
    return parse(model, values, str(path))


class TreeShape(StrictModel):
    """Shape of an EAGLE-2 dynamic draft tree.

    `width=1` gives a chain. The best `size - 1` drafted nodes are verified together with the root.
    """

    depth: int = Field(6, ge=1, le=16, description="draft steps per round")
    width: int = Field(10, ge=1, le=32, description="nodes expanded per step and children drafted per node")
    size: int = Field(60, ge=2, le=128, description="nodes verified, root included")

    @model_validator(mode="after")
    def _size_is_reachable(self) -> TreeShape:
        drafted = self.width + (self.depth - 1) * self.width**2
        if self.size - 1 > drafted:
            raise ValueError(f"size {self.size} needs {self.size - 1} drafted nodes but the tree drafts only {drafted}")
        return self

    @classmethod
    def parse(cls, text: str) -> TreeShape:
        """Parse `SIZE/WIDTH/DEPTH`, the notation of the paper (for example ``60/10/6``)."""
        try:
            size, width, depth = (int(part) for part in text.split("/"))
        except ValueError:
            raise PrismError(f"tree {text!r} is not of the form SIZE/WIDTH/DEPTH, for example 60/10/6") from None
        return parse(cls, {"depth": depth, "width": width, "size": size}, f"tree {text}")

    def __str__(self) -> str:
        return f"{self.size}/{self.width}/{self.depth}"


class RopeScaling(StrictModel):
    """LLaMA-3 rescaling of the rotary frequencies, in the spelling of Hugging Face configs."""

    rope_type: Literal["llama3"] = "llama3"
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(ge=1)


class DrafterConfig(StrictModel):
    """Shape and origin of a PRISM drafter, stored as ``config.json`` of its checkpoint directory."""

    kind: Literal["prism"] = "prism"
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2)
    rms_norm_eps: float = Field(gt=0)
    rope_theta: float = Field(gt=0)
    rope_scaling: RopeScaling | None = None
    num_modules: int = Field(ge=1, description="processing modules M")
    step_map: tuple[int, ...] = Field(description="module of each draft step; later steps use the last entry")
    features: Literal["last"] = Field("last", description="target hidden states fed to step 0: after the final norm")
    kv_mode: Literal["producer"] = Field("producer", description="K/V stays as its module wrote it")
    fc_bias: bool = False
    draft_vocab_size: int | None = Field(None, ge=1, description="None: the drafter predicts the whole vocabulary")
    target_fingerprint: str
    provenance: dict[str, Any] = Field(default_factory=dict, description="how it was trained")

    @model_validator(mode="after")
    def _is_consistent(self) -> DrafterConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if set(self.step_map) != set(range(self.num_modules)):
            raise ValueError(f"step_map {list(self.step_map)} must use every module 0..{self.num_modules - 1}")
        return self


class GenerationConfig(StrictModel):
    """How the target answers the training prompts."""

    max_prompt_tokens: int = Field(512, ge=1, description="prompts with more tokens are dropped")
    max_new_tokens: int = Field(256, ge=2, description="answers end after this many tokens")
    sampled_share: float = Field(0.2, ge=0, le=1, description="share of answers that are sampled; the rest is greedy")
    temperature: float = Field(0.7, gt=0, description="temperature of the sampled answers")
    top_k: int = Field(50, ge=1, description="sampled answers choose among this many tokens")
    answer_seed: int = Field(0, ge=0, description="seed of prompt order and sampled answers")


class TrainConfig(StrictModel):
    """How a drafter is trained. Stages follow each other: one_step (EAGLE), alignment (HASS), tuning (PRISM)."""

    modules: int = Field(2, ge=1, le=8, description="processing modules M after tuning; step k uses module min(k, M-1)")
    draft_vocab_size: int = Field(8192, ge=0, description="most frequent tokens the drafter can predict; 0 for all")
    intermediate_size: int = Field(0, ge=0, description="MLP width of a module; 0 for the target's")
    one_step_updates: int = Field(6000, ge=0, description="updates of stage one_step")
    alignment_updates: int = Field(1500, ge=0, description="updates of stage alignment")
    tuning_updates: int = Field(1500, ge=0, description="updates of stage tuning, from M copies of the module")
    alignment_steps: int = Field(3, ge=1, le=8, description="draft steps per update of stage alignment")
    tuning_steps: int = Field(4, ge=1, le=8, description="draft steps per update of stage tuning")
    one_step_lr: float = Field(1.5e-3, gt=0, description="peak learning rate of stage one_step")
    alignment_lr: float = Field(1e-3, gt=0, description="peak learning rate of stage alignment")
    tuning_lr: float = Field(5e-4, gt=0, description="peak learning rate of stage tuning")
    warmup: float = Field(0.02, ge=0, lt=1, description="share of each stage with linearly rising learning rate")
    final_lr: float = Field(0.02, ge=0, le=1, description="share of the peak learning rate where the cosine decay ends")
    rows_per_update: int = Field(2048, ge=1, description="answer tokens per update")
    hidden_weight: float = Field(1.0, ge=0, description="weight of the hidden-state loss in one_step and alignment")
    cross_entropy_weight: float = Field(0.1, gt=0, description="weight of the soft cross-entropy in every stage")
    tuning_hidden_weight: float = Field(0.0, ge=0, description="weight of the hidden-state loss in stage tuning")
    noise: float = Field(0.1, ge=0, description="half-width of the uniform noise on the features in stage one_step")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon applies to matrices, AdamW to the rest")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    clip: float = Field(1.0, gt=0, description="gradients are scaled to at most this norm")
    compute: Literal["bfloat16", "float32"] = Field("bfloat16", description="dtype of the matrix products")
    seed: int = Field(0, ge=0, description="seed of initialisation, data order and noise")
    hold_back: int = Field(64, ge=0, description="greedy answers held back to simulate the acceptance length")
    save_every: int = Field(500, ge=1, description="updates between checkpoints")
    simulate_every: int = Field(500, ge=1, description="updates between simulations of the acceptance length")
    log_every: int = Field(20, ge=1, description="updates between measurements of loss and accuracy")
