"""Recognise each kind of artifact and check it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prism_trt.build.bundle import KIND as BUNDLE_KIND
from prism_trt.build.bundle import MANIFEST as BUNDLE_MANIFEST
from prism_trt.build.bundle import read_bundle
from prism_trt.config import DrafterConfig, DrafterKind
from prism_trt.data.feature_cache import KIND as CACHE_KIND
from prism_trt.data.feature_cache import MANIFEST_FILE as CACHE_MANIFEST
from prism_trt.data.feature_cache import FeatureCache
from prism_trt.data.regenerate import PLAN_FILE
from prism_trt.deploy.repository import ENGINE_DIRECTORY, read_repository
from prism_trt.deploy.repository import MANIFEST as REPOSITORY_MANIFEST
from prism_trt.drafter.checkpoint import drafter_tensors, load_drafter
from prism_trt.engines.cpu.library import cpu_flags
from prism_trt.engines.loading import load_engine_tokenizer
from prism_trt.engines.manifest import ENGINE_KIND, ENGINE_MANIFEST, EngineManifest, read_engine_manifest
from prism_trt.engines.tensorrt.files import KERNELS
from prism_trt.errors import PrismError
from prism_trt.inspect.report import Report, require
from prism_trt.inspect.trtllm import (
    checkpoint_facts,
    checkpoint_manifest,
    expected_shapes,
    require_agreement,
    require_tensors,
)
from prism_trt.manifest import own_fields, read_manifest, verify_files
from prism_trt.target.config import TargetConfig
from prism_trt.target.loading import Target, load_target
from prism_trt.trtllm.export import KIND as CHECKPOINT_KIND
from prism_trt.trtllm.export import MANIFEST_FILE as CHECKPOINT_MANIFEST

_EXCERPT_TOKENS = 48


def inspect_path(path: Path, target: Path | None = None) -> Report:
    """Find out what `path` is and check it; with `target`, also that it belongs to that target.

    Raises:
        PrismError: `path` does not exist or is none of the known kinds, or `target` cannot be loaded.
    """
    path = Path(path)
    if not path.exists():
        raise PrismError(f"{path} does not exist: pass a file or directory that does")
    kind = _kind(path)
    loaded = load_target(target) if target is not None else None
    report = Report(str(path), kind)
    _INSPECTORS[kind](report, path, loaded)
    return report


def _kind(path: Path) -> str:
    if path.is_dir():
        for name, kind in _MARKERS.items():
            if (path / name).is_file():
                return kind
        if (path / "config.json").is_file():
            return "drafter" if _json_object(path / "config.json").get("kind") in get_args(DrafterKind) else "target"
    elif path.suffix == ".gguf":
        return "target"
    raise PrismError(
        f"{path} is none of target (HF directory or GGUF file), drafter, engine, engine bundle, TensorRT-LLM "
        "checkpoint, feature cache and model repository: pass the directory that one of the commands wrote"
    )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PrismError(f"{path} is not readable JSON ({error}): copy or write it again") from None
    require(isinstance(values, dict), f"{path} must hold a JSON object: copy or write it again")
    return dict(values)


def _inspect_target(report: Report, path: Path, expected: Target | None) -> None:
    target = report.check("config, tensors and tokenizer load", lambda: load_target(path))
    if target is None:
        return
    report.facts |= _target_facts(target.config)
    report.facts["fingerprint"] = target.fingerprint
    report.facts["parameters"] = _count(target.model.parameters())
    report.check("all weights are finite", lambda: _require_finite(target.model.state_dict()))
    report.check("every token id has an embedding", lambda: _require_vocab(target.tokenizer.vocab_size, target.config))
    if expected is not None:
        report.check("is the given target", lambda: _require_fingerprint(target.fingerprint, expected))


def _inspect_drafter(report: Report, path: Path, expected: Target | None) -> None:
    drafter = report.check("config, tensor names and shapes", lambda: load_drafter(path))
    if drafter is None:
        return
    config = drafter.config
    report.facts |= _drafter_facts(config)
    report.facts["parameters"] = _count(drafter.parameters())
    report.facts["dtype"] = str(next(drafter.parameters()).dtype).removeprefix("torch.")
    report.facts["target fingerprint"] = config.target_fingerprint
    report.facts |= {f"provenance: {key}": _shown(value) for key, value in config.provenance.items()}
    report.check("all weights are finite", lambda: _require_finite(drafter_tensors(drafter)))
    if expected is not None:
        report.check("belongs to the given target", lambda: load_drafter(path, expected))


def _inspect_engine(report: Report, path: Path, expected: Target | None) -> None:
    manifest = report.check("manifest and file sizes", lambda: read_engine_manifest(path))
    if manifest is None:
        return
    report.facts |= _engine_facts(manifest)
    files = read_manifest(path, ENGINE_MANIFEST, ENGINE_KIND)
    report.check(f"SHA-256 of {len(files['files'])} files", lambda: verify_files(path, files))
    tokenizer = report.check("tokenizer loads", lambda: load_engine_tokenizer(path))
    if tokenizer is not None:
        size = tokenizer.vocab_size
        report.check("every token id has an embedding", lambda: _require_vocab(size, manifest.target))
    if drafter := manifest.drafter:
        report.check("drafter and target belong together", lambda: _require_pair(drafter, manifest))
    if expected is not None:
        report.check("belongs to the given target", lambda: _require_fingerprint(manifest.target_fingerprint, expected))


def _inspect_repository(report: Report, path: Path, expected: Target | None) -> None:
    manifest = report.check("manifest and file sizes", lambda: read_repository(path))
    if manifest is None:
        return
    model = manifest["model"]
    report.facts["model"] = model
    report.facts |= {f"parameter {key}": _shown(value) for key, value in manifest.get("parameters", {}).items()}
    report.check(f"SHA-256 of {len(manifest['files'])} files", lambda: verify_files(path, manifest))
    engine = Report("", ENGINE_KIND)
    _inspect_engine(engine, path / model / "1" / ENGINE_DIRECTORY, expected)
    report.facts |= {f"engine: {name}": value for name, value in engine.facts.items()}
    report.checks += [replace(check, name=f"engine: {check.name}") for check in engine.checks]


def _inspect_bundle(report: Report, path: Path, expected: Target | None) -> None:
    manifest = report.check("manifest and file sizes", lambda: read_bundle(path))
    if manifest is None:
        return
    report.facts |= {
        "profile": manifest.profile,
        "dtype": manifest.dtype,
        "limits": f"{manifest.limits.slots} slots of {manifest.limits.context} tokens",
        "default tree": str(manifest.default_tree),
        "compiled plugins": str(len(list((path / KERNELS).glob("*.ptx")))),
        "target fingerprint": manifest.target_fingerprint,
    }
    report.facts |= {f"{name} deviates by": f"{error:.2%}" for name, error in manifest.deviation.items()}
    files = read_manifest(path, BUNDLE_MANIFEST, BUNDLE_KIND)
    report.check(f"SHA-256 of {len(files['files'])} files", lambda: verify_files(path, files))
    if expected is not None:
        report.check("belongs to the given target", lambda: _require_fingerprint(manifest.target_fingerprint, expected))


def _inspect_checkpoint(report: Report, path: Path, expected: Target | None) -> None:
    manifest = report.check(
        "manifest and file sizes", lambda: read_manifest(path, CHECKPOINT_MANIFEST, CHECKPOINT_KIND)
    )
    if manifest is None:
        return
    own = report.check("fields of the manifest", lambda: checkpoint_manifest(manifest, path / CHECKPOINT_MANIFEST))
    report.check(f"SHA-256 of {len(manifest['files'])} files", lambda: verify_files(path, manifest))
    if own is None:
        return
    report.facts |= checkpoint_facts(own)
    if report.sound:
        config = _json_object(path / "config.json")
        report.check("config.json fits the manifest", lambda: require_agreement(config, own))
        shapes = report.check("config.json is complete", lambda: expected_shapes(config, own.options))
        if shapes is not None:
            for rank in range(own.options.ranks):
                file = path / f"rank{rank}.safetensors"
                report.check(f"tensors of rank {rank}", partial(require_tensors, file, shapes))
    if expected is not None:
        report.check("belongs to the given target", lambda: _require_fingerprint(own.target_fingerprint, expected))


def _inspect_cache(report: Report, path: Path, expected: Target | None) -> None:
    manifest = report.check("manifest and file sizes", lambda: _read_cache_manifest(path))
    if manifest is None:
        return
    report.check(f"SHA-256 of {len(manifest['files'])} files", lambda: verify_files(path, manifest))
    report.facts |= {key: _shown(value) for key, value in own_fields(manifest).items()}
    width = manifest.get("feature_size")
    for name in sorted(manifest["files"]):
        if name.endswith(".safetensors"):
            report.check(f"shapes in {name}", lambda shard=path / name: _require_shard(shard, width))  # type: ignore[misc]
    if expected is None or not report.sound:
        return
    cache = report.check("belongs to the given target", lambda: FeatureCache(path, expected, "none"))
    if cache is not None and len(cache):
        sequence = cache.sequence(0)
        prompt = sequence.tokens[: sequence.prompt_length].tolist()
        answer = sequence.tokens[sequence.prompt_length :].tolist()
        report.facts["first prompt ends (no loss)"] = repr(expected.tokenizer.decode(prompt[-_EXCERPT_TOKENS:]))
        report.facts["first answer starts (loss)"] = repr(expected.tokenizer.decode(answer[:_EXCERPT_TOKENS]))


_MARKERS = {
    ENGINE_MANIFEST: "engine",
    REPOSITORY_MANIFEST: "model repository",
    BUNDLE_MANIFEST: BUNDLE_KIND,
    CHECKPOINT_MANIFEST: CHECKPOINT_KIND,
    CACHE_MANIFEST: CACHE_KIND,
    PLAN_FILE: CACHE_KIND,
}
_INSPECTORS = {
    "target": _inspect_target,
    "drafter": _inspect_drafter,
    "engine": _inspect_engine,
    "model repository": _inspect_repository,
    BUNDLE_KIND: _inspect_bundle,
    CHECKPOINT_KIND: _inspect_checkpoint,
    CACHE_KIND: _inspect_cache,
}


def _read_cache_manifest(path: Path) -> dict[str, Any]:
    shards = len(list(path.glob("*.safetensors")))
    require(
        (path / CACHE_MANIFEST).is_file(),
        f"{path} is unfinished ({shards} shards but no {CACHE_MANIFEST}): run the same training command again to go on",
    )
    return read_manifest(path, CACHE_MANIFEST, CACHE_KIND)


def _require_shard(path: Path, width: int | None) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
            offsets, prompts = file.get_tensor("offsets"), file.get_tensor("prompt_lengths")
    except (OSError, SafetensorError) as error:
        raise PrismError(f"{path} cannot be read ({error}): delete it and generate the cache again") from None
    tokens, sequences = int(offsets[-1]), len(offsets) - 1
    wanted = {
        "tokens": [tokens],
        "features": [tokens - sequences, width if width is not None else shapes.get("features", [0, 0])[-1]],
        "offsets": [sequences + 1],
        "prompt_lengths": [sequences],
        "greedy": [sequences],
    }
    again = "generate the cache again"
    require(shapes == wanted, f"{path} holds tensors of shapes {shapes} instead of {wanted}: {again}")
    split = bool((prompts > 0).all() and (prompts < offsets.diff()).all())
    require(split, f"{path} has a sequence without a prompt or without an answer: {again}")


def _require_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        finite = not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
        require(finite, f"{name} holds infinite or undefined values: copy or train it again")


def _require_vocab(tokens: int, config: TargetConfig) -> None:
    require(
        tokens <= config.vocab_size,
        f"the tokenizer has {tokens} tokens but the target only {config.vocab_size} embeddings: use its own tokenizer",
    )


def _require_fingerprint(found: str, expected: Target) -> None:
    require(
        found == expected.fingerprint,
        f"its target has fingerprint {found[:12]}, {expected.path} has {expected.fingerprint[:12]}: pass its own",
    )


def _require_pair(drafter: DrafterConfig, manifest: EngineManifest) -> None:
    again, wanted = "build the engine again", manifest.target_fingerprint
    require(
        drafter.target_fingerprint == wanted,
        f"the drafter was trained for target {drafter.target_fingerprint[:12]}, not {wanted[:12]}: {again}",
    )
    require(
        drafter.hidden_size == manifest.target.hidden_size,
        f"the drafter has hidden size {drafter.hidden_size}, the target {manifest.target.hidden_size}: {again}",
    )


def _target_facts(config: TargetConfig) -> dict[str, str]:
    return {
        "layers": str(config.num_layers),
        "hidden size": str(config.hidden_size),
        "heads": f"{config.num_heads} (key/value {config.num_kv_heads}) of {config.head_dim}",
        "vocabulary": str(config.vocab_size),
        "positions": str(config.max_position_embeddings),
    }


def _drafter_facts(config: DrafterConfig) -> dict[str, str]:
    return {
        "modules": f"{config.num_modules}, step map {list(config.step_map)}",
        "hidden size": str(config.hidden_size),
        "heads": f"{config.num_heads} (key/value {config.num_kv_heads}) of {config.head_dim}",
        "draft vocabulary": str(config.draft_vocab_size or "the target's"),
    }


def _engine_facts(manifest: EngineManifest) -> dict[str, str]:
    facts = {
        "profile": manifest.profile,
        "runtime": ", ".join(filter(None, (manifest.runtime, manifest.isa, manifest.dtype))),
        "runs on this machine": _runs_here(manifest),
        "limits": f"{manifest.limits.slots} slots of {manifest.limits.context} tokens",
        "default tree": str(manifest.default_tree),
        "target fingerprint": manifest.target_fingerprint,
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    if manifest.latency_ms is not None:
        times = sorted(manifest.latency_ms.forward[1].items())
        facts["target pass when built"] = ", ".join(f"{tokens} tokens {ms:.1f} ms" for tokens, ms in times)
    if manifest.gpu is not None:
        facts |= {f"{name} network": f"{r.layers} layers" for name, r in manifest.gpu.networks.items()}
        if (quantized := manifest.gpu.quantization) is not None:
            prompts = quantized.calibrated_prompts + quantized.measured_prompts
            facts["quantisation"] = str(quantized)
            facts["calibration"] = f"{prompts} prompts of a file with SHA-256 {quantized.calibration_sha256[:12]}"
    facts |= {f"target {name}": value for name, value in _target_facts(manifest.target).items()}
    if manifest.drafter is None:
        return facts | {"drafter": "none: plain decoding only"}
    return facts | {f"drafter {name}": value for name, value in _drafter_facts(manifest.drafter).items()}


def _runs_here(manifest: EngineManifest) -> str:
    if manifest.gpu is not None:
        return f"on a GPU of compute capability {manifest.gpu.compute_capability} only"
    if manifest.runtime == "torch-cuda":
        return "yes" if torch.cuda.is_available() else "no: it needs an NVIDIA GPU"
    missing = sorted(set(manifest.cpu_flags) - cpu_flags())
    return "yes" if not missing else f"no: its processor lacks {', '.join(missing)}"


def _count(parameters: Iterable[Tensor]) -> str:
    return f"{sum(parameter.numel() for parameter in parameters):,}"


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
