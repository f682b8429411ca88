"""Regeneration: the target answers the training prompts itself, and its hidden states are kept.

Training on the target's own answers matters because the drafter is to predict the target and not the author of some
data set.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prism_trt.config import GenerationConfig
from prism_trt.data.feature_cache import KIND, MANIFEST_FILE, shard_path, write_shard
from prism_trt.data.sequences import FeatureSequence
from prism_trt.engines.protocol import Engine
from prism_trt.errors import PrismError
from prism_trt.manifest import atomic_file, nearest_existing, read_manifest, sha256_json, write_manifest
from prism_trt.speculative.decoder import Decoder, Request
from prism_trt.speculative.sampling import SamplingParams
from prism_trt.target.loading import Target

PLAN_FILE = "plan.json"
SHARD_PROMPTS = 256
_SHARDS = "shard-*.safetensors"


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

    def first(self, answers: int | None) -> dict[int, list[int]]:
        """By shard, the indices of the prompts that are asked for `answers` answers (all when None)."""
        count = len(self.prompts) if answers is None else min(answers, len(self.prompts))
        indices = first_answers(np.arange(len(self.prompts)), count, self.settings.answer_seed).tolist()
        return {shard: list(group) for shard, group in groupby(indices, lambda index: index // SHARD_PROMPTS)}

    def shards(self, answers: int | None) -> int:
        """Shards that hold `answers` answers (all when None)."""
        return len(self.first(answers))

    def largest_bytes(self, shards: Iterable[int], answers: int | None = None) -> int:
        """Size of `shards` in a cache of `answers` answers (all when None) if each one has full length."""
        bytes_per_token = 4 + 2 * self.feature_size
        first = self.first(answers)
        tokens = sum(len(self.prompts[i]) + self.settings.max_new_tokens for shard in shards for i in first[shard])
        return tokens * bytes_per_token


def first_answers(answers: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The first `count` of `answers`, which are in the order of a cache: whole shards, then a part of the next one.

    Shards are sorted by the length of their prompts, so the part is drawn by `seed` instead of cut off. A larger
    `count` keeps what a smaller one chooses.
    """
    whole = count - count % SHARD_PROMPTS
    next_shard = answers[whole : whole + SHARD_PROMPTS]
    drawn = np.random.default_rng(seed).permutation(len(next_shard))[: count - whole]
    return np.concatenate([answers[:whole], next_shard[np.sort(drawn)]])


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
    """Numbers of the hidden states that the answers in `directory` have; empty when there are none."""
    if not _has_answers(Path(directory)):
        return ()
    try:
        return tuple(json.loads((Path(directory) / PLAN_FILE).read_text())["feature_layers"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def missing_answers(plan: GenerationPlan, directory: Path, answers: int | None = None) -> dict[int, list[int]]:
    """By shard, the indices of the prompts that `regenerate` would ask. Nothing is written.

    Raises:
        PrismError: `directory` is a file or holds something else, or a cache of another plan.
    """
    _require_place(Path(directory), plan.identity)
    return {
        shard: indices
        for shard, indices in plan.first(answers).items()
        if not _is_complete(shard_path(directory, shard), len(indices))
    }


def regenerate(
    plan: GenerationPlan,
    open_engine: Callable[[], Engine],
    directory: Path,
    answers: int | None = None,
    announce: Callable[[str], None] = lambda message: None,
    listener: Callable[[GenerationProgress], None] = lambda progress: None,
) -> None:
    """Fill `directory` with the answers to `answers` prompts of `plan`.

    Finished shards are kept, so the same call continues where an interrupted one stopped, and a larger `answers`
    extends a complete cache (its last shard is generated again if it was not whole). The answer to a prompt does not
    depend on when or with which others it is generated, except for rounding differences between batch shapes if the
    engine has any.

    Args:
        open_engine: makes an engine for the plan's target; called only when something is missing.
        announce: told the size before anything is written, and the counts at the end.

    Raises:
        PrismError: `directory` is a file or holds something else, or a cache of other prompts, settings or another
            target; the disk is too small; the engine's context cannot hold prompt and answer; or no answer is usable.
    """
    directory = Path(directory)
    missing = missing_answers(plan, directory, answers)
    for path in _unfinished(directory):
        path.unlink(missing_ok=True)
    if missing:
        need = plan.largest_bytes(missing, answers)
        free = shutil.disk_usage(nearest_existing(directory)).free
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
        with atomic_file(directory / PLAN_FILE) as temporary:
            temporary.write_text(json.dumps(plan.identity, indent=2) + "\n")
        (directory / MANIFEST_FILE).unlink(missing_ok=True)
        _answer(plan, engine, directory, plan.first(answers), missing, listener)
    if not _is_sealed(directory):
        _seal(plan, directory)
    counts = read_manifest(directory, MANIFEST_FILE, KIND)["counts"]
    announce(
        f"{counts['sequences']} answers, {counts['tokens']} tokens ({counts['answer_tokens']} of answers); "
        f"{counts['too_short']} answers of fewer than two tokens were left out"
    )


def _has_answers(directory: Path) -> bool:
    """Whether a shard is finished."""
    return any(directory.glob(_SHARDS))


def _unfinished(directory: Path) -> set[Path]:
    """What `atomic_file` left in a cache when a process was killed."""
    names = (f".{PLAN_FILE}.*", f".{MANIFEST_FILE}.*", f".{_SHARDS}.*")
    return {path for name in names for path in directory.glob(name)}


def _require_place(directory: Path, identity: dict[str, Any]) -> None:
    """Require that `directory` is new or empty, or holds a cache that has this identity or no answers yet."""
    place = nearest_existing(directory)
    if not place.is_dir():
        raise PrismError(f"{place} is a file: pass an empty or new directory as --cache")
    if not directory.is_dir() or set(directory.iterdir()) <= _unfinished(directory):
        return
    path = directory / PLAN_FILE
    if not path.is_file():
        raise PrismError(f"{directory} is not empty and not a feature cache: pass an empty or new directory as --cache")
    if not _has_answers(directory):
        return
    try:
        found = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise PrismError(f"{path} is damaged: delete {directory} and generate the cache again") from None
    if difference := _difference(found, identity):
        raise PrismError(f"{directory} holds a feature cache {difference}, or another --cache")


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """What sets the cache `found` apart and which options go with it, the most telling first; None if nothing does."""
    different = {key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)}
    if "tokenizer_fingerprint" in different:
        return "of another target, tokenizer or chat template: pass the --target that answered"
    if "target_fingerprint" in different:
        return "of another target: pass the --target that answered"
    if "feature_layers" in different and not found.get("feature_layers"):
        return "of tokens only, as --online keeps it: pass --online"
    if "feature_layers" in different or "feature_size" in different:
        states = f"the hidden states {found.get('feature_layers')} instead of {wanted['feature_layers']}"
        return f"with {states}: pass the same --features as before"
    if "settings" in different:
        before, now = found.get("settings") or {}, wanted["settings"]
        name = next((name for name in now if before.get(name) != now[name]), None)
        if name is not None:
            option = f"--{name.replace('_', '-')}"
            return f"with {option} {before.get(name)} instead of {now[name]}: pass {option} {before.get(name)}"
    if {"prompts", "prompts_sha256"} & different:
        return "of other prompts: pass the same --data and the same options that choose prompts as before"
    if different:
        return f"of another version of this program (another {min(different)}): use that version"
    return None


def _is_complete(path: Path, answers: int) -> bool:
    """Whether the shard holds so many answers, those left out included."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return int((file.metadata() or {}).get("answered", 0)) >= answers
    except (OSError, SafetensorError):
        return False


def _answer(
    plan: GenerationPlan,
    engine: Engine,
    directory: Path,
    wanted: Mapping[int, list[int]],
    missing: Mapping[int, list[int]],
    listener: Callable[[GenerationProgress], None],
) -> None:
    """Generate the `missing` ones of the shards `wanted`, keeping the engine full across their borders."""
    decoder = Decoder(engine, plan.target.tokenizer)
    queue = [index for indices in missing.values() for index in indices]
    total = sum(map(len, wanted.values()))
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
            if len(done[shard]) == len(wanted[shard]):
                _write(shard_path(directory, shard), done.pop(shard))
        listener(GenerationProgress(answered, total, new_tokens / (time.perf_counter() - began)))


def _request(plan: GenerationPlan, index: int) -> Request:
    return Request(
        prompt=plan.prompts[index],
        max_tokens=plan.settings.max_new_tokens,
        sampling=sampling_of(plan.settings, index),
        eos_token_ids=tuple(plan.target.tokenizer.eos_token_ids),
        collect_features=bool(plan.feature_layers),
    )


def sampling_of(settings: GenerationConfig, index: int) -> SamplingParams:
    """Sampling of answer `index`: a pure function of it and the seed."""
    random_numbers = random.Random(f"{settings.answer_seed}/{index}")
    if random_numbers.random() >= settings.sampled_share:
        return SamplingParams()
    return SamplingParams(temperature=settings.temperature, top_k=settings.top_k, seed=random_numbers.randrange(2**31))


def _sequence(tokens: list[int], features: Tensor, plan: GenerationPlan, index: int) -> FeatureSequence:
    greedy = sampling_of(plan.settings, index).greedy
    return FeatureSequence(torch.tensor(tokens), features, len(plan.prompts[index]), greedy)


def _write(path: Path, sequences: dict[int, FeatureSequence]) -> None:
    """Write the answers of one shard that have a row to learn from, in the order of their prompts."""
    usable = [sequence for _, sequence in sorted(sequences.items()) if sequence.roots > 0]
    metadata = {"answered": str(len(sequences)), "too_short": str(len(sequences) - len(usable))}
    write_shard(path, usable, metadata, next(iter(sequences.values())).features.shape[1])


def _is_sealed(directory: Path) -> bool:
    """Whether there is a sound manifest that lists exactly the shards that are there."""
    try:
        listed = read_manifest(directory, MANIFEST_FILE, KIND)["files"]
    except PrismError:
        return False
    return {path.name for path in directory.glob(_SHARDS)} | {PLAN_FILE} == set(listed)


def _seal(plan: GenerationPlan, directory: Path) -> None:
    """Write the manifest over all shards in `directory`."""
    counts = {"sequences": 0, "tokens": 0, "answer_tokens": 0, "greedy": 0, "too_short": 0}
    for path in sorted(directory.glob(_SHARDS)):
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
