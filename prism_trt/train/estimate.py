"""What a training run needs, told before its first step: parameters, memory, disk and time."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import torch

from prism_trt.config import TrainConfig
from prism_trt.data.regenerate import GenerationPlan
from prism_trt.data.sequences import FeatureSequence
from prism_trt.drafter.features import captured_layers
from prism_trt.drafter.model import Drafter
from prism_trt.target.loading import Target
from prism_trt.train.loop import Sequences, Trainer
from prism_trt.train.stages import stages
from prism_trt.train.world import World

_PROBE_SEQUENCES = 256


class RandomSequences:
    """In place of the feature cache of a plan: sequences of its prompts' lengths with random tokens and features."""

    data_sha256 = ""

    def __init__(self, plan: GenerationPlan, layers: tuple[int, ...]) -> None:
        """Sequences with the hidden states `layers` as features."""
        prompts = plan.prompts[:: max(1, len(plan.prompts) // _PROBE_SEQUENCES)]
        self.directory = Path("the plan")
        self.prompt_lengths: np.ndarray = np.array([len(prompt) for prompt in prompts])
        self.lengths: np.ndarray = self.prompt_lengths + plan.settings.max_new_tokens
        self.greedy: np.ndarray = np.ones(len(prompts), dtype=bool)
        self._count = len(layers)
        self._width = len(layers) * plan.target.config.hidden_size
        self._vocab = plan.target.config.vocab_size

    @property
    def roots(self) -> np.ndarray:
        """As `FeatureCache.roots`."""
        return self.lengths - self.prompt_lengths - 1

    def sequence(self, index: int) -> FeatureSequence:
        """As `FeatureCache.sequence`."""
        generator = torch.Generator().manual_seed(index)
        length = int(self.lengths[index])
        tokens = torch.randint(0, self._vocab, (length,), generator=generator)
        states = torch.randn(length - 1, self._width, generator=generator).bfloat16()
        return FeatureSequence.of(tokens, states, self._count, int(self.prompt_lengths[index]), True)

    def token_counts(self, indices: np.ndarray, vocab_size: int) -> np.ndarray:
        """As `FeatureCache.token_counts`."""
        return np.ones(vocab_size, dtype=np.int64)


def describe_run(
    target: Target,
    plan: GenerationPlan | None,
    answers: int | None,
    data: Sequences | None,
    config: TrainConfig,
    world: World,
) -> str:
    """Measure two updates of every stage, and say what the whole run needs, one finding per line.

    Args:
        plan: what is to be generated; None when `data` is complete.
        answers: how many prompts of `plan` are answered; None for all.
        data: None when there is only a plan.
    """
    if data is None:
        if plan is None:
            return "the first process says what the run needs"
        data = RandomSequences(plan, captured_layers(target.config, config.features))
    trainer = Trainer(target, data, config, Path(), None, world)
    planned = [stage for stage in stages(config) if stage.updates]
    lines, total = [], 0.0
    for stage in planned:
        rate = trainer.probe(stage)
        seconds = stage.updates * config.rows_per_update / rate
        total += seconds
        lines.append(
            f"stage {stage.name}: {stage.updates} updates at {rate:,.0f} rows/s (measured on two), "
            f"about {seconds / 60:.0f} min"
        )
    drafter = trainer.drafter_of(planned[-1]) if planned else trainer.drafter_of(stages(config)[0])
    parameters = sum(parameter.numel() for parameter in drafter.parameters())
    lines[:0] = [f"drafter: {parameters:,} trained parameters", *_active(drafter)]
    lines.append(f"training: about {total / 60:.0f} min on {world.size} process(es), device {world.device.type}")
    lines.append(
        f"memory: {_peak_bytes() / 2**30:.1f} GiB at most so far in this process, which is what training takes"
    )
    # Weights and two moments in float32, in the latest checkpoint and at the end of every stage.
    lines.append(f"checkpoints: {12 * parameters * (1 + len(planned)) / 1e9:.2f} GB")
    if plan is not None:
        size = plan.largest_bytes(range(plan.shards(answers))) / 1e9
        lines.append(f"feature cache: at most {size:.2f} GB for {answers or len(plan.prompts)} answers")
    return "\n".join(lines)


def _active(drafter: Drafter) -> list[str]:
    """For each draft step of the step map, the parameters it runs, those of the target's head included."""
    config = drafter.config
    head = (config.draft_vocab_size or 0) * config.hidden_size
    lines = []
    for step, module in enumerate(config.step_map):
        active = sum(parameter.numel() for parameter in drafter.module(step).parameters())
        last = " and later steps" if step + 1 == len(config.step_map) else ""
        fusion = (
            sum(parameter.numel() for parameter in drafter.fusion.parameters()) if drafter.fusion and not step else 0
        )
        lines.append(f"step {step}{last}: module {module}, {active + fusion:,} parameters and a head of {head:,}")
    return lines


def _peak_bytes() -> int:
    """Largest resident size of this process; getrusage counts KiB on Linux and bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
