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
        key = ".".join(str(part) for part in first["loc"])
        raise PrismError(": ".join(filter(None, (source, key, first["msg"].removeprefix("Value error, "))))) from None


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
    min_probability: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="nodes that the drafter thinks less likely than this are neither extended nor verified",
    )
    """Cumulative over the path. Saves work where the drafter is unsure; applied by engines that fuse greedy rounds."""

    @model_validator(mode="after")
    def _size_is_reachable(self) -> TreeShape:
        drafted = self.width + (self.depth - 1) * self.width**2
        if self.size - 1 > drafted:
            raise ValueError(f"size {self.size} needs {self.size - 1} drafted nodes but the tree drafts only {drafted}")
        return self

    @classmethod
    def parse(cls, text: str) -> TreeShape:
        """Parse ``SIZE/WIDTH/DEPTH``, the notation of the paper, or ``SIZE/WIDTH/DEPTH@MIN_PROBABILITY``.

        Raises:
            PrismError: `text` has another form, or no tree has that shape.
        """
        sizes, _, least = text.partition("@")
        try:
            size, width, depth = (int(part) for part in sizes.split("/"))
            min_probability = float(least) if least else 0.0
        except ValueError:
            raise PrismError(
                f"tree {text!r} is not of the form SIZE/WIDTH/DEPTH or SIZE/WIDTH/DEPTH@MIN_PROBABILITY, for example "
                "60/10/6 or 16/4/6@0.05"
            ) from None
        fields = {"depth": depth, "width": width, "size": size, "min_probability": min_probability}
        return parse(cls, fields, f"tree {text}")

    def __str__(self) -> str:
        least = f"@{self.min_probability:g}" if self.min_probability else ""
        return f"{self.size}/{self.width}/{self.depth}{least}"


class RopeScaling(StrictModel):
    """LLaMA-3 rescaling of the rotary frequencies, in the spelling of Hugging Face configs."""

    rope_type: Literal["llama3"] = "llama3"
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(ge=1)


SIMULATED_STEPS = 5
"""Draft steps of the simulated acceptance length, and so those whose difficulty is measured."""

DrafterKind = Literal["prism", "hass", "eagle2", "standard"]
Features = Literal["last", "multi", "none"]
KVMode = Literal["producer", "current"]


class DrafterConfig(StrictModel):
    """Shape and origin of a drafter, stored as ``config.json`` of its checkpoint directory."""

    kind: DrafterKind = Field("prism", description="eagle2 and hass have one module; standard is a small LM of its own")
    hidden_size: int = Field(ge=1, description="the target's, except for standard")
    intermediate_size: int = Field(ge=1)
    num_layers: int = Field(1, ge=1, description="transformer layers of a module")
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2)
    rms_norm_eps: float = Field(gt=0)
    rope_theta: float = Field(gt=0)
    rope_scaling: RopeScaling | None = None
    num_modules: int = Field(ge=1, description="processing modules M")
    step_map: tuple[int, ...] = Field(description="module of each draft step; later steps use the last entry")
    features: Features = Field("last", description="target hidden states fed to step 0; none for standard")
    feature_layers: tuple[int, ...] = Field((), description="multi: layers after which the fused states are taken")
    normalize_features: bool = Field(False, description="multi: each state is divided by its root mean square first")
    kv_mode: KVMode = Field("producer", description="K/V of earlier tokens in training; serving keeps its producer's")
    fc_bias: bool = False
    draft_vocab_size: int | None = Field(None, ge=1, description="None: the drafter predicts the whole vocabulary")
    target_fingerprint: str
    provenance: dict[str, Any] = Field(default_factory=dict, description="how it was trained, or where it came from")

    @model_validator(mode="after")
    def _is_consistent(self) -> DrafterConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if set(self.step_map) != set(range(self.num_modules)):
            raise ValueError(f"step_map {list(self.step_map)} must use every module 0..{self.num_modules - 1}")
        if self.kind != "prism" and self.num_modules != 1:
            raise ValueError(f"a drafter of kind {self.kind} has one module, not {self.num_modules}")
        if (self.kind == "standard") != (self.features == "none"):
            raise ValueError(f"a drafter of kind {self.kind} cannot have features {self.features}")
        if (self.features == "multi") != bool(self.feature_layers):
            raise ValueError("feature_layers belong to features multi, and to no others")
        if self.normalize_features and self.features != "multi":
            raise ValueError("normalize_features belongs to features multi, and to no others")
        if self.kv_mode == "current" and self.num_layers > 1:
            raise ValueError("kv_mode current is defined for modules of one layer")
        return self


_LARGE = 1e30
"""No sensible value is larger, and torch refuses some that are: float32 ends at 3e38."""


class GenerationConfig(StrictModel):
    """How the target answers the training prompts."""

    model_config = ConfigDict(allow_inf_nan=False)

    max_prompt_tokens: int = Field(512, ge=1, description="prompts with more tokens are dropped")
    max_new_tokens: int = Field(256, ge=2, description="answers end after this many tokens")
    sampled_share: float = Field(0.2, ge=0, le=1, description="share of answers that are sampled; the rest is greedy")
    temperature: float = Field(0.7, gt=0, description="temperature of the sampled answers")
    top_k: int = Field(50, ge=1, description="sampled answers choose among this many tokens")
    answer_seed: int = Field(0, ge=0, description="seed of prompt order and sampled answers")


class TrainConfig(StrictModel):
    """How a drafter is trained.

    Stages follow each other: one_step (EAGLE), alignment (HASS), tuning (PRISM). The kinds eagle2 and standard have the
    first only, hass the first two.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    kind: DrafterKind = Field("prism", description="prism, hass, eagle2, or standard (a small LM of its own)")
    features: Literal["last", "multi"] = Field(
        "last", description="hidden states fed: the last, or three of them fused"
    )
    kv_mode: KVMode = Field("producer", description="module whose K/V a step reads: its producer's, or current")
    modules: int = Field(2, ge=1, le=8, description="processing modules M of kind prism, after tuning")
    step_map: str = Field("", description="module of each draft step, as 0,1,1; empty: min(k, M-1); auto: as measured")
    layers: int = Field(1, ge=1, le=16, description="transformer layers of a module, or of a standard drafter")
    width: int = Field(0, ge=0, le=1 << 20, description="hidden width of a standard drafter; 0 for the target's")
    draft_vocab_size: int = Field(8192, ge=0, description="most frequent tokens the drafter can predict; 0 for all")
    intermediate_size: int = Field(
        0, ge=0, le=1 << 20, description="MLP width of a layer; 0 for the target's (in proportion)"
    )
    one_step_updates: int = Field(6000, ge=0, description="updates of stage one_step")
    alignment_updates: int = Field(1500, ge=0, description="updates of stage alignment")
    tuning_updates: int = Field(1500, ge=0, description="updates of stage tuning, from M copies of the module")
    alignment_steps: int = Field(3, ge=1, le=8, description="draft steps per update of stage alignment")
    tuning_steps: int = Field(4, ge=1, le=8, description="draft steps per update of stage tuning")
    one_step_lr: float = Field(1.5e-3, gt=0, le=_LARGE, description="peak learning rate of stage one_step")
    alignment_lr: float = Field(5e-4, gt=0, le=_LARGE, description="peak learning rate of stage alignment")
    tuning_lr: float = Field(5e-4, gt=0, le=_LARGE, description="peak learning rate of stage tuning")
    warmup: float = Field(0.02, ge=0, lt=1, description="share of each stage with linearly rising learning rate")
    final_lr: float = Field(0.02, ge=0, le=1, description="share of the peak learning rate where the cosine decay ends")
    rows_per_update: int = Field(1024, ge=1, description="answer tokens per update")
    rows_per_pass: int = Field(0, ge=0, description="answer tokens per forward pass, gradients added up; 0 for all")
    hidden_weight: float = Field(1.0, ge=0, description="weight of the hidden-state loss in one_step and alignment")
    cross_entropy_weight: float = Field(0.1, ge=1e-30, description="weight of the soft cross-entropy in every stage")
    alignment_top_k_weight: float = Field(1.0, ge=0, description="weight of HASS's top-K loss, for kind hass")
    tuning_hidden_weight: float = Field(0.0, ge=0, description="weight of the hidden-state loss in stage tuning")
    noise: float = Field(0.1, ge=0, le=_LARGE, description="half-width of the uniform noise on features in one_step")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon applies to matrices, AdamW to the rest")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    clip: float = Field(1.0, gt=0, description="gradients are scaled to at most this norm")
    compute: Literal["bfloat16", "float32"] = Field("bfloat16", description="dtype of the matrix products")
    seed: int = Field(0, ge=0, lt=1 << 64, description="seed of initialisation, data order and noise")
    hold_back: int = Field(64, ge=0, description="greedy answers held back to simulate the acceptance length")
    max_answers: int = Field(0, ge=0, description="answers trained on, those of the first shards; 0 for all")
    save_every: int = Field(500, ge=1, description="updates between checkpoints")
    simulate_every: int = Field(500, ge=1, description="updates between simulations of the acceptance length")
    log_every: int = Field(20, ge=1, description="updates between measurements of loss and accuracy")

    @model_validator(mode="after")
    def _is_consistent(self) -> TrainConfig:
        if self.width and self.kind != "standard":
            raise ValueError(f"width is for kind standard; a drafter of kind {self.kind} has the target's")
        if self.features == "multi" and self.kind == "standard":
            raise ValueError("a standard drafter reads no features: leave features out")
        if self.kv_mode == "current" and self.layers > 1:
            raise ValueError("kv_mode current is defined for modules of one layer: pass layers 1")
        if self.step_map not in ("", "auto") and set(self.fixed_step_map) != set(range(self.modules)):
            raise ValueError(f"step_map must use every module 0..{self.modules - 1}, as in 0,1,1")
        if self.kind == "prism" and set(self.fixed_step_map[: self.tuning_steps]) != set(range(self.modules)):
            raise ValueError(f"{self.tuning_steps} tuning_steps do not reach all {self.modules} modules: raise them")
        if self.measures_step_map and self.modules > SIMULATED_STEPS:
            raise ValueError(
                f"step_map auto measures {SIMULATED_STEPS} draft steps, too few for {self.modules} modules: lower "
                "modules, or name the step map"
            )
        if self.measures_step_map and not self.hold_back:
            raise ValueError("step_map auto measures on answers held back: raise hold_back, or name the step map")
        return self

    @property
    def measures_step_map(self) -> bool:
        """The step map is chosen from measured acceptance, when tuning begins."""
        return self.kind == "prism" and self.modules > 1 and self.step_map == "auto"

    @property
    def fixed_step_map(self) -> tuple[int, ...]:
        """The step map that does not depend on measurements: as given, or step k to module min(k, M-1)."""
        if self.step_map in ("", "auto"):
            return tuple(range(self.modules))
        try:
            return tuple(int(part) for part in self.step_map.split(","))
        except ValueError:
            raise ValueError(f"step_map {self.step_map!r} is not a list of modules, as in 0,1,1") from None
