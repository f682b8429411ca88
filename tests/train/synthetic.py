"""A tiny target and a feature cache of its own answers."""

from __future__ import annotations

from pathlib import Path

import torch

from prism_trt.config import GenerationConfig, TrainConfig
from prism_trt.data.regenerate import plan_generation, regenerate
from prism_trt.drafter.features import captured_layers
from prism_trt.engines.protocol import EngineLimits
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.target.loading import Target, save_hf
from tests.tiny import tiny_target

GENERATION = GenerationConfig(max_prompt_tokens=20, max_new_tokens=24, sampled_share=0.3)


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in lengths]


def torch_engine(target: Target, slots: int = 8, feature_layers: tuple[int, ...] | None = None) -> TorchEngine:
    limits = EngineLimits(slots, context=64, tokens_per_call=64)
    return TorchEngine(target, None, limits, torch.device("cpu"), feature_layers=feature_layers)


def write_target_and_cache(directory: Path, prompts: int = 40) -> Target:
    """Write `directory`/target and `directory`/cache."""
    target = tiny_target()
    save_hf(target, directory / "target")
    plan = plan_generation(random_prompts(prompts), GENERATION, target, captured_layers(target.config, "multi"))
    regenerate(plan, lambda: torch_engine(target, feature_layers=plan.feature_layers), directory / "cache")
    return target


def small_training(**changes: object) -> TrainConfig:
    """A few updates of each stage."""
    values = {
        "draft_vocab_size": 200,
        "one_step_updates": 6,
        "alignment_updates": 4,
        "tuning_updates": 4,
        "rows_per_update": 128,
        "hold_back": 6,
        "save_every": 2,
        "simulate_every": 5,
        "log_every": 2,
        "compute": "float32",
    }
    return TrainConfig.model_validate(values | changes)
