"""What a training run needs, told before its first step: parameters, memory, disk and time. Nothing is written."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from prism_trt.config import TrainConfig
from prism_trt.data.regenerate import GenerationPlan
from prism_trt.data.sequences import FeatureSequence
from prism_trt.drafter.model import Drafter
from prism_trt.engines.protocol import Engine
from prism_trt.manifest import nearest_existing
from prism_trt.speculative.decoder import Decoder, Request
from prism_trt.target.loading import Target
from prism_trt.train.loop import Sequences, Trainer
from prism_trt.train.stages import stages
from prism_trt.train.world import World

_PROBE_SEQUENCES = 256
_PROBE_TOKENS = 32


class RandomSequences:
    """In place of the feature cache of a plan: sequences of its prompts' lengths with random tokens and features."""

    data_sha256 = ""

    def __init__(self, plan: GenerationPlan, layers: tuple[int, ...]) -> None:
        """Sequences with the hidden states `layers` as features."""
        prompts = plan.prompts[:: max(1, len(plan.prompts) // _PROBE_SEQUENCES)]
        self.directory = Path("the plan")
        self.prompt_lengths: np.ndarray = np.array([len(prompt) for prompt in prompts])
        self.lengths: np.ndarray = self.prompt_lengths + plan.settings.max_new_tokens
        self.greedy: np.ndarray = np.full(len(prompts), plan.settings.sampled_share < 1)
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


def describe_answers(
    plan: GenerationPlan, missing: Mapping[int, list[int]], answers: int | None, engine: Engine, directory: Path
) -> tuple[list[str], int]:
    """What answering needs, one finding per line, after a few tokens of a few answers; and bytes on disk at most.

    Args:
        missing: by shard, the prompts of `plan` still to be answered; not empty.
        answers: how many prompts of `plan` are answered in all; None for all.
        engine: of the plan's target, as answering would use it.
        directory: of the cache.
    """
    indices = [index for group in missing.values() for index in group]
    asked = [plan.prompts[index] for index in indices[:: -(-len(indices) // engine.limits.slots)]]
    tokens = min(_PROBE_TOKENS, plan.settings.max_new_tokens - 1)
    _seconds(plan, engine, asked, 1 + tokens)  # the first time is slower
    prefill = _seconds(plan, engine, asked, 1)
    decode = max(_seconds(plan, engine, asked, 1 + tokens) - prefill, 1e-6)
    prompt_rate, rate = sum(map(len, asked)) / prefill, len(asked) * tokens / decode
    prompts = sum(len(plan.prompts[index]) for index in indices)
    seconds = prompts / prompt_rate + len(indices) * (plan.settings.max_new_tokens - 1) / rate
    size = plan.largest_bytes(missing, answers)
    return [
        f"answers: {len(indices):,} of up to {plan.settings.max_new_tokens} tokens at {rate:,.0f} tokens/s after "
        f"prompts at {prompt_rate:,.0f} tokens/s (measured on {len(asked)} of {1 + tokens} tokens), at most "
        f"{seconds / 60:.0f} min",
        f"feature cache: at most {size / 1e9:.2f} GB for {len(indices)} answers in {directory} "
        f"({free_bytes(directory) / 1e9:.1f} GB free)",
    ], size


def describe_training(
    target: Target, data: Sequences, config: TrainConfig, init: Drafter | None, world: World, work: Path
) -> tuple[list[str], int]:
    """What training needs, one finding per line, after two updates of every stage; and bytes of the checkpoints.

    Args:
        init: as `Trainer` takes it.
        world: the processes of the run; only this one measures.
        work: directory of the checkpoints.
    """
    trainer = Trainer(target, data, config, work, init, world.alone())
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
    lines[:0] = [f"drafter: {parameters:,} trained parameters", *_active(drafter, target.config.vocab_size)]
    shared = f", which the {world.size} of this run share" if world.size > 1 else ""
    lines.append(f"training: about {total / 60:.0f} min on 1 process{shared}, device {world.device.type}")
    lines.append(f"memory: {_peak(world.device)} at most so far in this process, which is what training takes")
    # Weights and two moments in float32, in the latest checkpoint and at the end of every stage.
    size = 12 * parameters * (1 + len(planned))
    lines.append(f"checkpoints: {size / 1e9:.2f} GB in {work} ({free_bytes(work) / 1e9:.1f} GB free)")
    return lines, size


def free_bytes(directory: Path) -> int:
    """Free space where `directory` is or will be."""
    return shutil.disk_usage(nearest_existing(directory)).free


def _seconds(plan: GenerationPlan, engine: Engine, prompts: list[list[int]], tokens: int) -> float:
    """How long `engine` takes to answer `prompts` with so many tokens each."""
    decoder = Decoder(engine, plan.target.tokenizer)
    began = time.perf_counter()
    for prompt in prompts:
        decoder.add(Request(prompt, tokens, collect_features=bool(plan.feature_layers)))
    while decoder.active:
        decoder.step()
    return time.perf_counter() - began


def _active(drafter: Drafter, vocab_size: int) -> list[str]:
    """For each draft step of the step map, the parameters it runs, those of the head included."""
    config = drafter.config
    head = (config.draft_vocab_size or vocab_size) * config.hidden_size
    lines = []
    for step, module in enumerate(config.step_map):
        active = sum(parameter.numel() for parameter in drafter.module(step).parameters())
        last = " and later steps" if step + 1 == len(config.step_map) else ""
        fusion = (
            sum(parameter.numel() for parameter in drafter.fusion.parameters()) if drafter.fusion and not step else 0
        )
        lines.append(f"step {step}{last}: module {module}, {active + fusion:,} parameters and a head of {head:,}")
    return lines


def _peak(device: torch.device) -> str:
    """The most memory that was taken: of the GPU by torch, or by this process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of the GPU"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage counts KiB on Linux and bytes on macOS.
    return f"{(peak if sys.platform == 'darwin' else peak * 1024) / 2**30:.1f} GiB"
