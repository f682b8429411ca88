"""The target's answers to the training prompts: planned, checked against what training needs, and generated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from prism_trt.config import TrainConfig
from prism_trt.data.regenerate import GenerationPlan, GenerationProgress, regenerate, sampling_of
from prism_trt.engines.loading import make_engine, torch_threads
from prism_trt.engines.protocol import Engine, EngineLimits
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.progress import progress
from prism_trt.train.held_back import hold_back

TOKENS_PER_CALL = 2048


def check_held_back(plan: GenerationPlan, answers: int | None, training: TrainConfig) -> None:
    """Refuse early what `hold_back` would refuse even if every answer had full length.

    Raises:
        PrismError: as `hold_back`.
    """
    indices = [index for group in plan.first(answers).values() for index in group]
    roots = np.full(len(indices), plan.settings.max_new_tokens - 1)
    hold_back(roots, np.array([sampling_of(plan.settings, index).greedy for index in indices]), training)


def open_engine(plan: GenerationPlan, slots: int, device: torch.device, threads: int, context: ExitStack) -> Engine:
    """An engine that answers `slots` prompts of `plan` at once; within `context`, torch leaves the CPU to it."""
    length = max(map(len, plan.prompts)) + plan.settings.max_new_tokens
    limits = EngineLimits(slots, length, max(TOKENS_PER_CALL, slots))
    engine = make_engine(plan.target, None, limits, threads, plan.feature_layers, device)
    if not isinstance(engine, TorchEngine):
        context.enter_context(torch_threads(1))
    return engine


def generate(
    plan: GenerationPlan,
    cache: Path,
    answers: int | None,
    slots: int,
    device: torch.device,
    announce: Callable[[str], None],
) -> None:
    """Fill `cache` with the answers that it lacks.

    Raises:
        PrismError: as `regenerate`.
    """
    threads = torch.get_num_threads()
    total = len(plan.prompts) if answers is None else min(answers, len(plan.prompts))
    with ExitStack() as own_threads, progress("answering", total) as reporter:
        shown = 0

        def listen(now: GenerationProgress) -> None:
            nonlocal shown
            reporter.advance(now.answered - shown)
            shown = now.answered
            reporter.describe(f"answering, {now.tokens_per_second:,.0f} tokens/s")

        def opened() -> Engine:
            return open_engine(plan, slots, device, threads, own_threads)

        regenerate(plan, opened, cache, answers, announce, listen)
