"""Regeneration: the target answers the training prompts itself, and its hidden states are kept.

Training on the target's own answers matters because the drafter is to predict the target and not the author of some
data set.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prism_trt.config import GenerationConfig
from prism_trt.data.feature_cache import KIND, MANIFEST_FILE, shard_path, write_shard
from prism_trt.data.sequences import FeatureSequence
from prism_trt.engines.protocol import Engine
from prism_trt.errors import PrismError
from prism_trt.manifest import atomic_file, read_manifest, sha256_json, write_manifest
from prism_trt.speculative.decoder import Decoder, Request
from prism_trt.speculative.sampling import SamplingParams
from prism_trt.target.loading import Target

PLAN_FILE = "plan.json"
SHARD_PROMPTS = 256


@dataclass(frozen=True)
class GenerationProgress:
    """Where a regeneration stands; passed to its listener after every round."""

    answered: int
    """Answers finished, those of earlier runs included."""
    total: int
    tokens_per_second: float
    """Tokens generated per second since this run began."""


@dataclass(frozen=True)
class GenerationPlan:
    """Everything that decides the contents of a cache."""

    prompts: list[list[int]]
    """In the order of generation: shuffled, then by length within a shard."""
    settings: GenerationConfig
    target: Target
    feature_layers: tuple[int, ...]
    """Numbers of the hidden states that are kept (see `prism_trt.drafter.features`)."""

    @property
    def feature_size(self) -> int:
        """Width F of the features of one token."""
        return len(self.feature_layers) * self.target.config.hidden_size

    @property
    def identity(self) -> dict[str, Any]:
        """What two runs must share for the second to continue the first."""
        return {
            "target_fingerprint": self.target.fingerprint,
            "tokenizer_fingerprint": self.target.tokenizer.fingerprint,
            "feature_layers": list(self.feature_layers),
            "feature_size": self.feature_size,
            "prompts_sha256": sha256_json(self.prompts),
            "prompts": len(self.prompts),
            "shard_prompts": SHARD_PROMPTS,
            "settings": self.settings.model_dump(),
        }

    def shards(self, answers: int | None) -> int:
        """Shards that hold the first `answers` prompts (all when None)."""
        wanted = len(self.prompts) if answers is None else min(answers, len(self.prompts))
        return -(-wanted // SHARD_PROMPTS)

    def shard_prompts(self, shard: int) -> range:
        """Indices of the prompts of a shard."""
        return range(shard * SHARD_PROMPTS, min((shard + 1) * SHARD_PROMPTS, len(self.prompts)))

    def largest_bytes(self, shards: range) -> int:
        """Size of `shards` if every answer has full length."""
        bytes_per_token = 4 + 2 * self.feature_size
        tokens = sum(
            len(self.prompts[i]) + self.settings.max_new_tokens for shard in shards for i in self.shard_prompts(shard)
        )
        return tokens * bytes_per_token


def plan_generation(
    prompts: list[list[int]], settings: GenerationConfig, target: Target, feature_layers: tuple[int, ...]
) -> GenerationPlan:
    """Shuffle `prompts` by the seed and sort them by length within each shard, so that prefills batch well.

    Args:
        feature_layers: numbers of the hidden states to keep (see `prism_trt.drafter.features`); none keeps tokens only.
    """
    order = list(prompts)
    random.Random(settings.answer_seed).shuffle(order)
    ordered = [
        prompt
        for first in range(0, len(order), SHARD_PROMPTS)
        for prompt in sorted(order[first : first + SHARD_PROMPTS], key=len)
    ]
    return GenerationPlan(ordered, settings, target, feature_layers)


def planned_layers(directory: Path) -> tuple[int, ...]:
    """Numbers of the hidden states that the cache begun in `directory` keeps; empty when there is none."""
    try:
        return tuple(json.loads((Path(directory) / PLAN_FILE).read_text())["feature_layers"])
    except (OSError, ValueError, KeyError):
        return ()


def regenerate(
    plan: GenerationPlan,
    open_engine: Callable[[], Engine],
    directory: Path,
    answers: int | None = None,
    announce: Callable[[str], None] = lambda message: None,
    listener: Callable[[GenerationProgress], None] = lambda progress: None,
) -> None:
    """Fill `directory` with the answers to the first `answers` prompts of `plan` (rounded up to whole shards).

    Finished shards are kept, so the same call continues where an interrupted one stopped, and a larger `answers`
    extends a complete cache. The answer to a prompt does not depend on when or with which others it is generated,
    except for rounding differences between batch shapes if the engine has any.

    Args:
        open_engine: makes an engine for the plan's target; called only when something is missing.
        announce: told the size before anything is written, and the counts at the end.

    Raises:
        PrismError: `directory` holds a cache of other prompts, settings or another target; the disk is too small; or
            the engine's context cannot hold prompt and answer.
    """
    directory = Path(directory)
    _claim(directory, plan.identity)
    shards = range(plan.shards(answers))
    missing = [shard for shard in shards if not _is_complete(shard_path(directory, shard), plan, shard)]
    if missing:
        need = sum(plan.largest_bytes(range(shard, shard + 1)) for shard in missing)
        free = shutil.disk_usage(directory).free
        announce(f"the feature cache grows by at most {need / 1e9:.2f} GB in {directory} ({free / 1e9:.1f} GB free)")
        if need > free:
            raise PrismError(
                f"the feature cache may need {need / 1e9:.2f} GB but {directory} has {free / 1e9:.2f} GB free: "
                "pass --cache on a larger disk, or a smaller --answers or --max-new-tokens"
            )
        engine = open_engine()
        longest = max(map(len, plan.prompts)) + plan.settings.max_new_tokens
        if longest > engine.limits.context:
            raise PrismError(
                f"the engine holds {engine.limits.context} tokens per sequence but prompt and answer may need "
                f"{longest}: lower --max-prompt-tokens or --max-new-tokens"
            )
        (directory / MANIFEST_FILE).unlink(missing_ok=True)
        _answer(plan, engine, directory, missing, len(shards), listener)
    if not _is_sealed(directory):
        _seal(plan, directory)
    counts = read_manifest(directory, MANIFEST_FILE, KIND)["counts"]
    announce(
        f"{counts['sequences']} answers, {counts['tokens']} tokens ({counts['answer_tokens']} of answers); "
        f"{counts['too_short']} answers of fewer than two tokens were left out"
    )


def _claim(directory: Path, identity: dict[str, Any]) -> None:
    """Write the plan's identity to an empty directory, or compare it with the one there."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / PLAN_FILE
    if not path.is_file():
        if any(directory.iterdir()):
            raise PrismError(
                f"{directory} is not empty and not a feature cache: pass an empty or new directory as --cache"
            )
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(identity, indent=2) + "\n")
        return
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise PrismError(f"{path} is damaged: delete {directory} and generate the cache again") from None
    different = sorted(key for key in set(found) | set(identity) if found.get(key) != identity.get(key))
    if different:
        raise PrismError(
            f"{directory} holds a feature cache with another {different[0]}: pass the same target, data and generation "
            "options as before, or another --cache"
        )


def _is_complete(path: Path, plan: GenerationPlan, shard: int) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return bool((file.metadata() or {}).get("answered") == str(len(plan.shard_prompts(shard))))
    except (OSError, SafetensorError):
        return False


def _answer(
    plan: GenerationPlan,
    engine: Engine,
    directory: Path,
    missing: list[int],
    shards: int,
    listener: Callable[[GenerationProgress], None],
) -> None:
    """Generate the `missing` shards, keeping the engine full across their borders."""
    decoder = Decoder(engine, plan.target.tokenizer)
    queue = [index for shard in missing for index in plan.shard_prompts(shard)]
    total = sum(len(plan.shard_prompts(shard)) for shard in range(shards))
    answered, new_tokens, position = total - len(queue), 0, 0
    began = time.perf_counter()
    running: dict[int, int] = {}
    outputs: dict[int, list[int]] = {}
    done: dict[int, dict[int, FeatureSequence]] = {shard: {} for shard in missing}
    while position < len(queue) or decoder.active:
        while position < len(queue) and decoder.active < 2 * engine.limits.slots:
            index = queue[position]
            running[decoder.add(_request(plan, index))] = index
            outputs[index] = []
            position += 1
        for event in decoder.step():
            index = running[event.id]
            outputs[index] += event.tokens
            new_tokens += len(event.tokens)
            if not event.finished:
                continue
            shard = index // SHARD_PROMPTS
            tokens = plan.prompts[index] + outputs.pop(index)
            del running[event.id]
            features = torch.empty(len(tokens) - 1, 0) if event.features is None else event.features
            done[shard][index] = _sequence(tokens, features, plan, index)
            answered += 1
            if len(done[shard]) == len(plan.shard_prompts(shard)):
                _write(shard_path(directory, shard), done.pop(shard))
        listener(GenerationProgress(answered, total, new_tokens / (time.perf_counter() - began)))


def _request(plan: GenerationPlan, index: int) -> Request:
    return Request(
        prompt=plan.prompts[index],
        max_tokens=plan.settings.max_new_tokens,
        sampling=_sampling(plan.settings, index),
        eos_token_ids=tuple(plan.target.tokenizer.eos_token_ids),
        collect_features=bool(plan.feature_layers),
    )


def _sampling(settings: GenerationConfig, index: int) -> SamplingParams:
    """Sampling of answer `index`: a pure function of it and the seed."""
    random_numbers = random.Random(f"{settings.answer_seed}/{index}")
    if random_numbers.random() >= settings.sampled_share:
        return SamplingParams()
    return SamplingParams(temperature=settings.temperature, top_k=settings.top_k, seed=random_numbers.randrange(2**31))


def _sequence(tokens: list[int], features: Tensor, plan: GenerationPlan, index: int) -> FeatureSequence:
    greedy = _sampling(plan.settings, index).greedy
    return FeatureSequence(torch.tensor(tokens), features, len(plan.prompts[index]), greedy)


def _write(path: Path, sequences: dict[int, FeatureSequence]) -> None:
    """Write the answers of one shard that have a row to learn from, in the order of their prompts."""
    usable = [sequence for _, sequence in sorted(sequences.items()) if sequence.roots > 0]
    write_shard(path, usable, {"answered": str(len(sequences)), "too_short": str(len(sequences) - len(usable))})


def _is_sealed(directory: Path) -> bool:
    """Whether the manifest lists exactly the shards that are there."""
    if not (directory / MANIFEST_FILE).is_file():
        return False
    listed = read_manifest(directory, MANIFEST_FILE, KIND)["files"]
    return {path.name for path in directory.glob("shard-*.safetensors")} | {PLAN_FILE} == set(listed)


def _seal(plan: GenerationPlan, directory: Path) -> None:
    """Write the manifest over all shards in `directory`."""
    counts = {"sequences": 0, "tokens": 0, "answer_tokens": 0, "greedy": 0, "too_short": 0}
    for path in sorted(directory.glob("shard-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            prompt_lengths, tokens = file.get_tensor("prompt_lengths"), len(file.get_tensor("tokens"))
            counts["sequences"] += len(prompt_lengths)
            counts["tokens"] += tokens
            counts["answer_tokens"] += tokens - int(prompt_lengths.sum())
            counts["greedy"] += int(file.get_tensor("greedy").sum())
            counts["too_short"] += int(file.metadata()["too_short"])
    if not counts["sequences"]:
        raise PrismError(
            "every answer of the target has fewer than two tokens: check the chat template and the prompts"
        )
    write_manifest(directory, MANIFEST_FILE, KIND, {**plan.identity, "counts": counts})
