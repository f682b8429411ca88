"""A whole training run: prompts, the target's answers, training, drafter directory."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import prism_trt
from prism_trt.config import DrafterConfig, GenerationConfig, TrainConfig
from prism_trt.data.feature_cache import KIND, MANIFEST_FILE, FeatureCache
from prism_trt.data.online import OnlineFeatures
from prism_trt.data.prompts import PromptConfig, prepare_prompts
from prism_trt.data.regenerate import GenerationPlan, GenerationProgress, plan_generation, planned_layers, regenerate
from prism_trt.drafter.checkpoint import load_drafter, save_drafter
from prism_trt.drafter.features import captured_layers
from prism_trt.engines.loading import make_engine, torch_threads
from prism_trt.engines.protocol import Engine, EngineLimits
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from prism_trt.manifest import read_manifest, sha256_file
from prism_trt.progress import progress
from prism_trt.target.loading import Target, load_target
from prism_trt.train.estimate import describe_run
from prism_trt.train.loop import Observer, Trainer, TrainingResult
from prism_trt.train.observers import OverfittingObserver, ProgressObserver, TensorBoardObserver, start_wandb
from prism_trt.train.stages import stages
from prism_trt.train.world import World

_TOKENS_PER_CALL = 2048


@dataclass(frozen=True)
class RunPaths:
    """Where a run reads and writes."""

    target: Path
    data: Path | None
    """File of records; None trains on a cache that is complete."""
    out: Path | None
    """Drafter directory; None only generates."""
    work: Path
    """Checkpoints and TensorBoard logs."""
    cache: Path
    init: Path | None = None
    """Drafter to start from instead of random weights; one of several modules is tuned only."""


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; none of it changes the trained weights by more than rounding."""

    slots: int = 64
    """Answers generated at once."""
    answers: int | None = None
    """Prompts to answer; None for all."""
    overwrite: bool = False
    """Replace an existing drafter directory."""
    wandb: str | None = None
    """Weights & Biases project that gets the TensorBoard scalars as well."""
    dry_run: bool = False
    """Only print what the run would need."""
    online: bool = False
    """Keep tokens only, and let the target compute features while the drafter trains."""


def run_training(
    paths: RunPaths,
    prompts: PromptConfig,
    generation: GenerationConfig,
    training: TrainConfig,
    options: RunOptions,
    world: World,
    command: list[str],
) -> None:
    """Answer the prompts, train, and write the drafter; each part continues where an interrupted run stopped.

    Args:
        command: the command line, recorded in the drafter.

    Raises:
        PrismError: for everything the user can put right.
    """
    out = paths.out
    if out is not None and out.exists() and not options.overwrite and (not out.is_dir() or any(out.iterdir())):
        raise PrismError(f"{out} already exists: choose another --out or pass --overwrite")
    target = load_target(paths.target)
    if paths.data is None and not (paths.cache / MANIFEST_FILE).is_file():
        raise PrismError(f"{paths.cache} is not a complete feature cache: pass --data to generate the answers")
    plan = None
    if paths.data is not None and world.first:
        plan = _plan(target, paths, prompts, generation, training, options.online)
    if options.dry_run:
        data = _open_data(target, paths.cache, training, options.online, world) if paths.data is None else None
        _say(describe_run(target, plan, options.answers, data, training, world))
        return
    if plan is not None:
        _generate(plan, paths, options, world.device)
    world.barrier()
    if out is None:
        return

    data = _open_data(target, paths.cache, training, options.online, world)
    paths.work.mkdir(parents=True, exist_ok=True)
    init = load_drafter(paths.init, target) if paths.init is not None else None
    trainer = Trainer(target, data, training, paths.work, init, world)
    with observers(training, paths.work, options.wandb, world) as watching:
        result = trainer.run(watching)
    if not world.first:
        return
    drafter = result.drafter
    provenance = _provenance(result, paths, training, world, command)
    if init is not None:
        provenance["init"] = {"weights_sha256": trainer.init_sha256, "provenance": init.config.provenance}
    drafter.config = DrafterConfig.model_validate(drafter.config.model_dump() | {"provenance": provenance})
    save_drafter(
        drafter.to(torch.bfloat16 if training.compute == "bfloat16" else torch.float32), out, options.overwrite
    )
    if result.vocabulary is not None:
        _say(
            f"draft vocabulary: {result.vocabulary.coverage:.1%} of the held-back tokens; simulated acceptance length "
            f"{result.vocabulary.chain:.3f}, with the whole vocabulary {result.vocabulary.chain_whole_vocabulary:.3f}"
        )
    _say(f"wrote {out}")


def _open_data(
    target: Target, directory: Path, training: TrainConfig, online: bool, world: World
) -> FeatureCache | OnlineFeatures:
    """The training data of `directory`, with features from there or from the target."""
    if not online:
        return FeatureCache(directory, target, training.features)
    cache = FeatureCache(directory, target, "none")
    layers = captured_layers(target.config, training.features)
    limits = EngineLimits(1, int(cache.lengths.max()), _TOKENS_PER_CALL)
    if world.device.type == "cpu":
        return OnlineFeatures(cache, make_engine(target, None, limits, None, layers), len(layers))
    engine = TorchEngine(target, None, limits, world.device, torch.bfloat16, layers)
    return OnlineFeatures(cache, engine, len(layers))


def _plan(
    target: Target,
    paths: RunPaths,
    prompts: PromptConfig,
    settings: GenerationConfig,
    training: TrainConfig,
    online: bool,
) -> GenerationPlan:
    assert paths.data is not None
    ids, report = prepare_prompts(paths.data, target.tokenizer, settings.max_prompt_tokens, prompts)
    for line in report.lines():
        _say(line)
    # Beside the cache, which holds nothing but what its manifest lists.
    report.save(paths.cache.with_name(f"{paths.cache.name}.data.json"))
    layers = captured_layers(target.config, "none" if online else training.features)
    kept = planned_layers(paths.cache)
    # A cache with more features than this training needs serves it as well.
    return plan_generation(ids, settings, target, kept if set(layers) <= set(kept) else layers)


def _generate(plan: GenerationPlan, paths: RunPaths, options: RunOptions, device: torch.device) -> None:
    threads = torch.get_num_threads()
    own_threads = ExitStack()

    def open_engine() -> Engine:
        context = max(map(len, plan.prompts)) + plan.settings.max_new_tokens
        limits = EngineLimits(options.slots, context, max(_TOKENS_PER_CALL, options.slots))
        engine = make_engine(plan.target, None, limits, threads, plan.feature_layers, device)
        if not isinstance(engine, TorchEngine):
            own_threads.enter_context(torch_threads(1))
        return engine

    total = len(plan.prompts) if options.answers is None else min(options.answers, len(plan.prompts))
    with own_threads, progress("answering", total) as reporter:
        shown = 0

        def listen(now: GenerationProgress) -> None:
            nonlocal shown
            reporter.advance(now.answered - shown)
            shown = now.answered
            reporter.describe(f"answering, {now.tokens_per_second:,.0f} tokens/s")

        regenerate(plan, open_engine, paths.cache, options.answers, _say, listen)


@contextmanager
def observers(training: TrainConfig, work: Path, wandb: str | None, world: World) -> Iterator[list[Observer]]:
    """The observers of a run: progress on the terminal, TensorBoard, and W&B where asked; none past the first rank.

    Raises:
        PrismError: W&B is asked for but not installed.
    """
    if not world.first:
        yield []
        return
    logs = work / "tensorboard"
    tracked = start_wandb(wandb, work, logs, training) if wandb is not None else nullcontext()
    with tracked, progress("training", sum(stage.updates for stage in stages(training))) as reporter:
        board = TensorBoardObserver(logs)
        try:
            yield [ProgressObserver(reporter), OverfittingObserver(_say), board]
        finally:
            board.close()


def _provenance(
    result: TrainingResult,
    paths: RunPaths,
    training: TrainConfig,
    world: World,
    command: list[str],
) -> dict[str, Any]:
    manifest = read_manifest(paths.cache, MANIFEST_FILE, KIND)
    return {
        "command": command,
        "data_sha256": None if paths.data is None else sha256_file(paths.data),
        "cache": {name: manifest[name] for name in ("counts", "settings", "prompts_sha256")},
        "training": training.model_dump(),
        "rows": result.rows,
        "seconds": round(result.seconds, 1),
        "threads": torch.get_num_threads(),
        "processes": world.size,
        "device": world.device.type,
        "simulated_acceptance": None if result.acceptance is None else asdict(result.acceptance),
        "vocabulary_loss": None if result.vocabulary is None else asdict(result.vocabulary),
        "versions": {
            "prism_trt": prism_trt.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
