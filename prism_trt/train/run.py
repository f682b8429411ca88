"""A whole training run: prompts, the target's answers, training, drafter directory."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

import prism_trt
from prism_trt.config import DrafterConfig, GenerationConfig, TrainConfig
from prism_trt.data.accounting import DataReport
from prism_trt.data.feature_cache import KIND, MANIFEST_FILE, FeatureCache
from prism_trt.data.online import OnlineFeatures
from prism_trt.data.prompts import PromptConfig, prepare_prompts
from prism_trt.data.regenerate import GenerationPlan, missing_answers, plan_generation, planned_layers
from prism_trt.drafter.checkpoint import save_drafter
from prism_trt.drafter.features import captured_layers
from prism_trt.drafter.model import Drafter
from prism_trt.engines.loading import make_engine
from prism_trt.engines.protocol import Engine, EngineLimits
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from prism_trt.manifest import nearest_existing, read_manifest, sha256_file
from prism_trt.progress import progress
from prism_trt.storage import writing
from prism_trt.target.loading import Target, load_target
from prism_trt.train.answers import TOKENS_PER_CALL, check_held_back, generate, open_engine
from prism_trt.train.estimate import RandomSequences, describe_answers, describe_training, free_bytes
from prism_trt.train.initial import load_init, new_shape
from prism_trt.train.loop import Observer, Sequences, Trainer, TrainingResult
from prism_trt.train.observers import (
    OverfittingObserver,
    ProgressObserver,
    TensorBoardObserver,
    quiet_writer,
    require_wandb,
    start_wandb,
)
from prism_trt.train.stages import stages
from prism_trt.train.world import World

_NOTHING_SIMULATED = (
    "no answer is greedy, so none is held back and no acceptance length is simulated: lower --sampled-share for that"
)


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
    _check_paths(paths, options.overwrite)
    if out is not None:
        _check_options(paths, training, options)
    target = load_target(paths.target)
    init = None
    if out is not None and paths.init is not None:
        init, training = load_init(paths.init, target, training)
    elif out is not None:
        new_shape(target, training)
    if paths.data is None and not (paths.cache / MANIFEST_FILE).is_file():
        raise PrismError(f"{paths.cache} is not a complete feature cache: pass --data to generate the answers")
    planned = None
    if paths.data is not None and world.first:
        planned = _plan(target, paths.data, paths.cache, prompts, generation, training, options)
        if planned.missing and out is not None:
            check_held_back(planned.plan, options.answers, training)
    if options.dry_run:
        if world.first:
            _describe(target, planned, paths, training, init, options, world)
        world.barrier()
        return
    if planned is not None:
        generate(planned.plan, paths.cache, options.answers, options.slots, world.device, _say)
        # Beside the cache, which holds nothing but what its manifest lists.
        planned.report.save(paths.cache.with_name(f"{paths.cache.name}.data.json"))
    world.barrier()
    if out is None:
        return

    data = _open_data(target, paths.cache, training, options.online, world.device)
    with writing(paths.work):
        paths.work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(target, data, training, paths.work, init, world)
    if world.first and training.hold_back and not trainer.simulates:
        _say(_NOTHING_SIMULATED)
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


def _check_paths(paths: RunPaths, overwrite: bool) -> None:
    """Refuse places that cannot be written to."""
    out = paths.out
    if out is not None and out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise PrismError(f"{out} already exists: choose another --out or pass --overwrite")
    places = ({} if out is None else {"--out": out.parent}) | {"--work": paths.work, "--cache": paths.cache}
    for option, path in places.items():
        if not (place := nearest_existing(path)).is_dir():
            raise PrismError(f"{place} is a file, so nothing can be written below it: choose another {option}")


def _check_options(paths: RunPaths, training: TrainConfig, options: RunOptions) -> None:
    """Refuse what no training can be carried out with."""
    if paths.init is None and not any(stage.updates for stage in stages(training)):
        raise PrismError(
            "no stage has updates, so the drafter would stay random: raise --one-step-updates, or pass --init with "
            "the drafter to start from"
        )
    if options.wandb is not None:
        require_wandb()


@dataclass(frozen=True)
class _Planned:
    """Answers that a run asks for."""

    plan: GenerationPlan
    report: DataReport
    missing: dict[int, list[int]]
    """See `missing_answers`."""


def _plan(
    target: Target,
    data: Path,
    cache: Path,
    prompts: PromptConfig,
    settings: GenerationConfig,
    training: TrainConfig,
    options: RunOptions,
) -> _Planned:
    ids, report = prepare_prompts(data, target.tokenizer, settings.max_prompt_tokens, prompts)
    for line in report.lines():
        _say(line)
    layers = captured_layers(target.config, "none" if options.online else training.features)
    kept = planned_layers(cache)
    # A cache with more features than this training needs serves it as well.
    plan = plan_generation(ids, settings, target, kept if set(layers) <= set(kept) else layers)
    return _Planned(plan, report, missing_answers(plan, cache, options.answers))


def _open_data(
    target: Target, directory: Path, training: TrainConfig, online: bool, device: torch.device
) -> FeatureCache | OnlineFeatures:
    """The training data of `directory`, with features from there or from the target."""
    if not online:
        return FeatureCache(directory, target, training.features)
    return _with_features(FeatureCache(directory, target, "none"), target, training, device)


def _with_features(
    tokens: FeatureCache | RandomSequences, target: Target, training: TrainConfig, device: torch.device
) -> OnlineFeatures:
    """Sequences of tokens with features from the target."""
    layers = captured_layers(target.config, training.features)
    limits = EngineLimits(1, int(tokens.lengths.max()), TOKENS_PER_CALL)
    engine: Engine
    if device.type == "cpu":
        engine = make_engine(target, None, limits, None, layers)
    else:
        engine = TorchEngine(target, None, limits, device, torch.bfloat16, layers)
    return OnlineFeatures(cast(FeatureCache, tokens), engine, len(layers))


def _describe(
    target: Target,
    planned: _Planned | None,
    paths: RunPaths,
    training: TrainConfig,
    init: Drafter | None,
    options: RunOptions,
    world: World,
) -> None:
    """Say what the run needs, measured by this process alone.

    Raises:
        PrismError: the disk has no room for the answers.
    """
    need = 0
    if planned is not None and planned.missing:
        with ExitStack() as own_threads:
            engine = open_engine(planned.plan, options.slots, world.device, torch.get_num_threads(), own_threads)
            lines, need = describe_answers(planned.plan, planned.missing, options.answers, engine, paths.cache)
            del engine
        _say("\n".join(lines))
    if paths.out is not None:
        data, probed = _probed(target, planned, paths, training, options, world.device)
        if training.hold_back and not data.greedy.any():
            _say(_NOTHING_SIMULATED)
        lines, size = describe_training(target, data, probed, init, world, paths.work)
        _say("\n".join(lines))
        same_disk = nearest_existing(paths.work).stat().st_dev == nearest_existing(paths.cache).stat().st_dev
        if free_bytes(paths.work) < size + (need if same_disk else 0):
            _say(f"warning: {paths.work} has no room for the checkpoints: pass --work on a larger disk")
    if free_bytes(paths.cache) < need:
        raise PrismError(
            f"the feature cache may not fit into {paths.cache}: pass --cache on a larger disk, or a smaller --answers "
            "or --max-new-tokens"
        )


def _probed(
    target: Target,
    planned: _Planned | None,
    paths: RunPaths,
    training: TrainConfig,
    options: RunOptions,
    device: torch.device,
) -> tuple[Sequences, TrainConfig]:
    """What training is measured on: the cache, or as long as it is not complete, sequences like those planned."""
    if planned is None or ((paths.cache / MANIFEST_FILE).is_file() and not planned.missing):
        return _open_data(target, paths.cache, training, options.online, device), training
    layers = () if options.online else captured_layers(target.config, training.features)
    sequences = RandomSequences(planned.plan, layers)
    few = min(training.hold_back, len(sequences.lengths) // 2)
    probed = training.model_copy(update={"hold_back": few})
    return _with_features(sequences, target, training, device) if options.online else sequences, probed


@contextmanager
def observers(training: TrainConfig, work: Path, wandb: str | None, world: World) -> Iterator[list[Observer]]:
    """The observers of a run: progress on the terminal, TensorBoard, and W&B where asked; none past the first rank.

    Raises:
        PrismError: W&B is asked for but not installed, or the logs cannot be written.
    """
    if not world.first:
        yield []
        return
    logs = work / "tensorboard"
    tracked = start_wandb(wandb, work, logs, training) if wandb is not None else nullcontext()
    with tracked, quiet_writer(), progress("training", sum(stage.updates for stage in stages(training))) as reporter:
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
    acceptance = result.acceptance
    simulated = {} if acceptance is None or not acceptance.roots else {"simulated_acceptance": asdict(acceptance)}
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
        **simulated,
        "vocabulary_loss": None if result.vocabulary is None else asdict(result.vocabulary),
        "versions": {
            "prism_trt": prism_trt.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
