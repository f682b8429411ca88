"""The drafter, engine and model repository in the work directory: made when missing, reused when they still fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import prism_trt
from prism_trt.build import build_engine
from prism_trt.config import DrafterConfig, GenerationConfig, TrainConfig, parse_json_file
from prism_trt.data.prompts import PromptConfig
from prism_trt.deploy.repository import read_repository, write_repository
from prism_trt.engines.cpu.library import cpu_flags, find_compiler
from prism_trt.engines.manifest import ENGINE_MANIFEST, EngineManifest, read_engine_manifest
from prism_trt.errors import PrismError
from prism_trt.manifest import sha256_file, sha256_json
from prism_trt.train.run import RunOptions, RunPaths, run_training
from prism_trt.train.world import ALONE

PROMPTS = Path(__file__).with_name("prompts.jsonl")
SHIPPED = Path(__file__).parents[1] / "assets" / "smollm2-135m-instruct-prism"
MODEL_NAME = "prism"

GENERATION = GenerationConfig(max_prompt_tokens=192, max_new_tokens=192)
TRAINING = TrainConfig(
    draft_vocab_size=4096,
    one_step_updates=500,
    alignment_updates=60,
    tuning_updates=60,
    rows_per_update=1024,
    hold_back=16,
    simulate_every=200,
    save_every=200,
)
SLOTS = 64


@dataclass(frozen=True)
class Artifact:
    """A directory that is ready to use."""

    path: Path
    reused: bool


def shipped_drafter() -> Path | None:
    """The drafter inside the package; None when this installation has none."""
    return SHIPPED if (SHIPPED / "config.json").is_file() else None


def prepare_drafter(
    target: Path,
    work: Path,
    prompts: Path = PROMPTS,
    generation: GenerationConfig = GENERATION,
    training: TrainConfig = TRAINING,
) -> Artifact:
    """Train `work/drafter` on the target's answers to `prompts`, or reuse it when it came from the same input.

    An interrupted training continues on the next call.

    Raises:
        PrismError: as `prism_trt.train.run.run_training`.
    """
    drafter = work / "drafter"
    if _trained_alike(drafter, prompts, generation, training):
        return Artifact(drafter, True)
    # A name of its own for each input, so that an interrupted training is continued by the same input only.
    key = sha256_json([sha256_file(prompts), generation.model_dump(), training.model_dump()])
    scratch = work / f"training-{key[:12]}"
    paths = RunPaths(target, prompts, drafter, scratch, scratch / "cache")
    options = RunOptions(slots=SLOTS, overwrite=True)
    run_training(paths, PromptConfig(), generation, training, options, ALONE, ["prism_trt.quickstart"])
    shutil.rmtree(scratch)
    return Artifact(drafter, False)


def prepare_engine(target: Path, drafter: Path, work: Path, say: Callable[[str], None]) -> Artifact:
    """Build `work/engine` for this machine, or reuse it when it is intact and was built from `drafter`.

    Raises:
        PrismError: as `prism_trt.build.build_engine`.
    """
    engine = work / "engine"
    if _still_fits(engine, drafter):
        return Artifact(engine, True)
    build_engine(profile="cpu", target=target, drafter=drafter, out=engine, overwrite=True, say=say)
    return Artifact(engine, False)


def prepare_repository(engine: Path, work: Path, threads: int | None) -> Artifact:
    """Write `work/repository` for `engine`, or reuse it when it is intact and serves this engine alike."""
    repository = work / "repository"
    served = repository / MODEL_NAME / "1" / "engine" / ENGINE_MANIFEST
    tree = str(read_engine_manifest(engine).default_tree)  # the one that is measured
    wanted = (tree, None if threads is None else str(threads))
    try:
        parameters = read_repository(repository)["parameters"]
        fits = (parameters.get("tree"), parameters.get("threads")) == wanted
        if fits and sha256_file(served) == sha256_file(engine / ENGINE_MANIFEST):
            return Artifact(repository, True)
    except (PrismError, OSError, KeyError, AttributeError):
        pass
    write_repository(engine, repository, MODEL_NAME, tree=tree, threads=threads, overwrite=True)
    return Artifact(repository, False)


def _trained_alike(drafter: Path, prompts: Path, generation: GenerationConfig, training: TrainConfig) -> bool:
    try:
        provenance = parse_json_file(DrafterConfig, drafter / "config.json").provenance
    except PrismError:
        return False
    return (
        provenance.get("data_sha256") == sha256_file(prompts)
        and provenance.get("training") == training.model_dump()
        and provenance.get("cache", {}).get("settings", {}).items() >= generation.model_dump().items()
    )


def _still_fits(engine: Path, drafter: Path) -> bool:
    try:
        manifest: EngineManifest = read_engine_manifest(engine)
    except PrismError:
        return False
    compiled = manifest.runtime == "cpp"
    return (
        manifest.drafter_sha256 == sha256_file(drafter / "model.safetensors")
        and manifest.versions.get("prism_trt") == prism_trt.__version__
        and set(manifest.cpu_flags) <= cpu_flags()
        and (compiled or find_compiler() is None)
    )
