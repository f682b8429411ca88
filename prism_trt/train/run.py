"""A whole training run: prompts, the target's answers, training, drafter directory."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import prism_trt
from prism_trt.config import DrafterConfig, GenerationConfig, TrainConfig
from prism_trt.data.feature_cache import MANIFEST_FILE, FeatureCache
from prism_trt.data.prompts import read_messages, tokenize_prompts
from prism_trt.data.regenerate import GenerationProgress, plan_generation, regenerate
from prism_trt.drafter.checkpoint import load_drafter, save_drafter
from prism_trt.engines.loading import make_engine
from prism_trt.engines.protocol import Engine, EngineLimits
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from prism_trt.manifest import sha256_file
from prism_trt.progress import progress
from prism_trt.target.loading import Target, load_target
from prism_trt.train.loop import Trainer, TrainingResult
from prism_trt.train.observers import ProgressObserver, TensorBoardObserver
from prism_trt.train.stages import stages

_TOKENS_PER_CALL = 2048


@dataclass(frozen=True)
class RunPaths:
    """Where a run reads and writes."""

    target: Path
    data: Path | None
    """JSONL prompts; None trains on a cache that is complete."""
    out: Path | None
    """Drafter directory; None only generates."""
    work: Path
    """Checkpoints and TensorBoard logs."""
    cache: Path
    init: Path | None = None
    """Drafter of one module to start from instead of random weights."""


def run_training(
    paths: RunPaths,
    generation: GenerationConfig,
    training: TrainConfig,
    slots: int,
    answers: int | None,
    overwrite: bool,
    command: list[str],
) -> None:
    """Answer the prompts, train, and write the drafter; each part continues where an interrupted run stopped.

    Args:
        slots: answers generated at once.
        answers: prompts to answer; None for all.
        overwrite: replace an existing drafter directory.
        command: the command line, recorded in the drafter.

    Raises:
        PrismError: for everything the user can put right.
    """
    out = paths.out
    if out is not None and out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise PrismError(f"{out} already exists: choose another --out or pass --overwrite")
    conversations = read_messages(paths.data) if paths.data is not None else None
    target = load_target(paths.target)
    if conversations is not None:
        _generate(target, conversations, paths, generation, slots, answers)
    elif not (paths.cache / MANIFEST_FILE).is_file():
        raise PrismError(f"{paths.cache} is not a complete feature cache: pass --data to generate the answers")
    if out is None:
        return

    cache = FeatureCache(paths.cache, target)
    paths.work.mkdir(parents=True, exist_ok=True)
    init = load_drafter(paths.init, target) if paths.init is not None else None
    trainer = Trainer(target, cache, training, paths.work, init)
    board = TensorBoardObserver(paths.work / "tensorboard")
    updates = sum(stage.updates for stage in stages(training))
    try:
        with progress("training", updates) as reporter:
            result = trainer.run([ProgressObserver(reporter), board])
    finally:
        board.close()
    drafter = result.drafter
    provenance = _provenance(result, cache, paths, training, command)
    drafter.config = DrafterConfig.model_validate(drafter.config.model_dump() | {"provenance": provenance})
    save_drafter(drafter.to(torch.bfloat16 if training.compute == "bfloat16" else torch.float32), out, overwrite)
    _say(f"wrote {out}")


def _generate(
    target: Target,
    conversations: list[list[dict[str, str]]],
    paths: RunPaths,
    settings: GenerationConfig,
    slots: int,
    answers: int | None,
) -> None:
    prompts = tokenize_prompts(conversations, target.tokenizer, settings.max_prompt_tokens)
    _say(
        f"{len(prompts.prompts)} prompts; left out: {prompts.too_long} of more than {settings.max_prompt_tokens} "
        f"tokens, {prompts.duplicates} repeated"
    )
    plan = plan_generation(prompts.prompts, settings, target)
    threads = torch.get_num_threads()

    def open_engine() -> Engine:
        context = max(map(len, prompts.prompts)) + settings.max_new_tokens
        engine = make_engine(target, None, EngineLimits(slots, context, max(_TOKENS_PER_CALL, slots)), threads)
        if not isinstance(engine, TorchEngine):
            # A compiled engine has threads of its own; torch's would wait for the same processors.
            torch.set_num_threads(1)
        return engine

    total = len(prompts.prompts) if answers is None else min(answers, len(prompts.prompts))
    with progress("answering", total) as reporter:
        shown = 0

        def listen(now: GenerationProgress) -> None:
            nonlocal shown
            reporter.advance(now.answered - shown)
            shown = now.answered
            reporter.describe(f"answering, {now.tokens_per_second:,.0f} tokens/s")

        regenerate(plan, open_engine, paths.cache, answers, _say, listen)
    torch.set_num_threads(threads)


def _provenance(
    result: TrainingResult, cache: FeatureCache, paths: RunPaths, training: TrainConfig, command: list[str]
) -> dict[str, Any]:
    return {
        "command": command,
        "data_sha256": None if paths.data is None else sha256_file(paths.data),
        "cache_sha256": cache.data_sha256,
        "cache": {"counts": cache.manifest["counts"], "settings": cache.manifest["settings"]},
        "training": training.model_dump(),
        "rows": result.rows,
        "seconds": round(result.seconds, 1),
        "threads": torch.get_num_threads(),
        "simulated_acceptance": None if result.acceptance is None else asdict(result.acceptance),
        "versions": {
            "prism_trt": prism_trt.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
