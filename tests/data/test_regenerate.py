"""Regeneration and the cache it fills: what is stored is what the target says and computes."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections import namedtuple
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from prism_trt.config import GenerationConfig
from prism_trt.data import regenerate as regenerate_module
from prism_trt.data.feature_cache import MANIFEST_FILE, FeatureCache, shard_path, write_shard
from prism_trt.data.regenerate import (
    PLAN_FILE,
    GenerationPlan,
    GenerationProgress,
    first_answers,
    missing_answers,
    plan_generation,
    planned_layers,
    regenerate,
)
from prism_trt.data.sequences import FeatureSequence
from prism_trt.drafter.features import captured_layers
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from prism_trt.inspect.artifacts import inspect_path
from prism_trt.target.loading import Target
from prism_trt.target.tokenizer import Tokenizer
from tests.tiny import tiny_target
from tests.train.synthetic import GENERATION, random_prompts, torch_engine


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regenerate_module, "SHARD_PROMPTS", 8)


def make_plan(target: Target, count: int = 20, **changes: float) -> GenerationPlan:
    settings = GenerationConfig.model_validate(GENERATION.model_dump() | changes)
    return plan_generation(random_prompts(count), settings, target, captured_layers(target.config, "last"))


def ending_at(target: Target, tokens: tuple[int, ...]) -> Target:
    """`target` whose answers end at any of `tokens`."""
    settings = target.tokenizer.settings.model_copy(update={"eos_token_ids": tokens})
    return dataclasses.replace(target, tokenizer=Tokenizer(target.tokenizer._fast, settings))


def never() -> TorchEngine:
    raise AssertionError("nothing is to be generated")


def shard_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("shard-*"))}


def test_greedy_answers_and_features_are_the_targets_own(target: Target, tmp_path: Path) -> None:
    plan = make_plan(target, sampled_share=0.0)
    seen: list[GenerationProgress] = []
    regenerate(plan, lambda: torch_engine(target, slots=3), tmp_path / "cache", listener=seen.append)
    cache = FeatureCache(tmp_path / "cache", target)
    assert seen[-1].answered == seen[-1].total == 20
    assert len(cache) + cache.manifest["counts"]["too_short"] == 20
    assert cache.greedy.all()
    for index in range(len(cache)):
        sequence = cache.sequence(index)
        tokens = sequence.tokens
        with torch.inference_mode():
            features = target.model.forward_sequence(tokens[None])[0]
            choices = target.model.head(features).argmax(-1)
        prompt = sequence.prompt_length
        assert tokens[:prompt].tolist() in plan.prompts
        assert tokens[prompt:].tolist() == choices[prompt - 1 : -1].tolist()
        torch.testing.assert_close(sequence.features.float(), features[:-1], rtol=0.02, atol=0.02)
        ended = int(tokens[-1]) in target.tokenizer.eos_token_ids
        assert ended or len(tokens) - prompt == plan.settings.max_new_tokens


def test_the_sampled_share_is_sampled_and_marked(target: Target, tmp_path: Path) -> None:
    plan = make_plan(target, sampled_share=0.5)
    regenerate(plan, lambda: torch_engine(target), tmp_path / "sampled")
    regenerate(make_plan(target, sampled_share=0.0), lambda: torch_engine(target), tmp_path / "greedy")
    sampled, greedy = FeatureCache(tmp_path / "sampled", target), FeatureCache(tmp_path / "greedy", target)
    assert 0 < sampled.greedy.sum() < len(sampled)
    answers = {tuple(s.tokens.tolist()) for s in map(greedy.sequence, range(len(greedy)))}
    same = [tuple(sampled.sequence(i).tokens.tolist()) in answers for i in range(len(sampled))]
    assert all(same[i] for i in range(len(sampled)) if sampled.greedy[i])
    assert not any(same[i] for i in range(len(sampled)) if not sampled.greedy[i])


def test_an_interrupted_regeneration_continues_to_the_same_cache(target: Target, tmp_path: Path) -> None:
    plan = make_plan(target)
    regenerate(plan, lambda: torch_engine(target), tmp_path / "whole")

    def stop(progress: GenerationProgress) -> None:
        if progress.answered >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regenerate(plan, lambda: torch_engine(target), tmp_path / "cut", listener=stop)
    assert 0 < len(shard_bytes(tmp_path / "cut")) < 3
    with pytest.raises(PrismError, match=MANIFEST_FILE):
        FeatureCache(tmp_path / "cut", target)
    regenerate(plan, lambda: torch_engine(target), tmp_path / "cut")
    whole, cut = FeatureCache(tmp_path / "whole", target), FeatureCache(tmp_path / "cut", target)
    assert len(whole) == len(cut)
    for index in range(len(whole)):
        assert torch.equal(whole.sequence(index).tokens, cut.sequence(index).tokens)


def test_a_larger_number_of_answers_extends_the_cache(target: Target, tmp_path: Path) -> None:
    plan = make_plan(target)
    regenerate(plan, lambda: torch_engine(target), tmp_path / "cache", answers=8)
    few = shard_bytes(tmp_path / "cache")
    assert list(few) == ["shard-00000.safetensors"]
    regenerate(plan, lambda: torch_engine(target), tmp_path / "cache")
    many = shard_bytes(tmp_path / "cache")
    assert len(many) == 3
    assert many["shard-00000.safetensors"] == few["shard-00000.safetensors"]
    assert len(FeatureCache(tmp_path / "cache", target)) > 8


def test_a_complete_cache_is_not_generated_again(target: Target, tmp_path: Path) -> None:
    plan = make_plan(target)
    regenerate(plan, lambda: torch_engine(target), tmp_path / "cache")
    regenerate(plan, never, tmp_path / "cache")


def test_exactly_as_many_prompts_are_answered_as_asked_for(target: Target, tmp_path: Path) -> None:
    plan, directory = make_plan(target), tmp_path / "cache"
    seen: list[GenerationProgress] = []
    for answers in (3, 10, 20):
        assert sum(map(len, plan.first(answers).values())) == answers
        missing = missing_answers(plan, directory, answers)
        assert sum(map(len, missing.values())) == answers - {3: 0, 10: 0, 20: 8}[answers]
        regenerate(plan, lambda: torch_engine(target), directory, answers, listener=seen.append)
        cache = FeatureCache(directory, target)
        assert len(cache) + cache.manifest["counts"]["too_short"] == answers == seen[-1].answered == seen[-1].total
        regenerate(plan, never, directory, answers)
    regenerate(plan, never, directory, answers=10)
    regenerate(plan, lambda: torch_engine(target), tmp_path / "whole")
    whole = FeatureCache(tmp_path / "whole", target)
    assert all(torch.equal(cache.sequence(i).tokens, whole.sequence(i).tokens) for i in range(len(whole)))


def test_a_part_of_a_shard_is_drawn_and_not_its_shortest_prompts() -> None:
    answers = np.arange(100, 130)
    for count in (0, 8, 16, 30, 40):
        assert first_answers(answers, count, seed=1).tolist() == answers[:count].tolist()
    chosen = [set(first_answers(answers, count, seed=1).tolist()) for count in range(31)]
    assert [len(part) for part in chosen] == list(range(31))
    assert all(smaller < larger for smaller, larger in pairwise(chosen))
    assert first_answers(answers, 11, seed=1).tolist() == sorted(chosen[11])
    assert chosen[11] > set(range(100, 108))
    drawn = [first_answers(answers, 11, seed)[8:] for seed in range(400)]
    assert abs(np.mean(drawn) - (108 + 115) / 2) < 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: {"settings": plan.settings.model_copy(update={"temperature": 0.9})}, "--temperature 0.7 instead"),
        (lambda plan: {"prompts": plan.prompts[:19]}, "of other prompts: pass the same --data"),
        (lambda plan: {"target": tiny_target(rms_norm_eps=1e-4)}, "of another target: pass the --target"),
        (lambda plan: {"target": ending_at(plan.target, (1,))}, "of another target, tokenizer or chat template"),
        (lambda plan: {"feature_layers": (0, 2)}, r"with the hidden states \[2\] instead of \[0, 2\]: .* --features"),
    ],
)
def test_a_cache_of_something_else_is_refused_in_the_users_words(
    change: Any, message: str, target: Target, tmp_path: Path
) -> None:
    plan = make_plan(target)
    regenerate(plan, lambda: torch_engine(target), tmp_path / "cache", answers=5)
    other = dataclasses.replace(plan, **change(plan))
    if "of other prompts" not in message:  # what decides the prompts is named, and not the prompts
        other = dataclasses.replace(other, prompts=other.prompts[::-1])
    with pytest.raises(PrismError, match=message):
        regenerate(other, never, tmp_path / "cache")


def test_a_cache_of_tokens_only_asks_for_online(target: Target, tmp_path: Path) -> None:
    plan = dataclasses.replace(make_plan(target), feature_layers=())
    regenerate(plan, lambda: torch_engine(target), tmp_path / "cache", answers=5)
    with pytest.raises(PrismError, match=r"of tokens only, .* pass --online"):
        regenerate(make_plan(target), never, tmp_path / "cache")
    with pytest.raises(PrismError, match="holds tokens only: pass --online"):
        FeatureCache(tmp_path / "cache", target)
    assert len(FeatureCache(tmp_path / "cache", target, "none"))


def test_a_directory_with_other_files_is_refused(target: Target, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(PrismError, match="not empty"):
        regenerate(make_plan(target), lambda: torch_engine(target), tmp_path)


def test_a_full_disk_is_noticed_before_anything_is_written(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    said: list[str] = []
    with pytest.raises(PrismError, match="free"):
        regenerate(make_plan(target), lambda: torch_engine(target), tmp_path / "cache", announce=said.append)
    assert "GB" in said[0]
    assert not (tmp_path / "cache").exists()


def test_a_context_too_short_for_prompt_and_answer_is_refused(target: Target, tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="lower --max-prompt-tokens"):
        regenerate(make_plan(target, max_new_tokens=60), lambda: torch_engine(target), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    regenerate(make_plan(target), lambda: torch_engine(target), tmp_path / "cache")


def test_a_plan_without_answers_is_replaced(target: Target, tmp_path: Path) -> None:
    def stop(progress: GenerationProgress) -> None:
        raise KeyboardInterrupt

    directory = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        regenerate(make_plan(target), lambda: torch_engine(target), directory, listener=stop)
    assert [path.name for path in directory.iterdir()] == [PLAN_FILE]
    assert planned_layers(directory) == ()
    regenerate(make_plan(target, max_new_tokens=8), lambda: torch_engine(target), directory)
    assert FeatureCache(directory, target).manifest["settings"]["max_new_tokens"] == 8
    assert planned_layers(directory) == (2,)


def test_a_file_in_the_place_of_the_cache_or_above_it_is_named(target: Target, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for directory in (file, file / "cache", file / "deep" / "cache"):
        assert planned_layers(directory) == ()
        with pytest.raises(PrismError, match="file is a file: pass an empty or new directory as --cache"):
            regenerate(make_plan(target), never, directory)
    assert file.read_text() == "x"


@pytest.mark.parametrize("text", ["", '{"format": 1, "kind": "fea'])
def test_a_damaged_manifest_is_written_again_by_generation_only(text: str, target: Target, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    regenerate(make_plan(target), lambda: torch_engine(target), directory)
    sound = (directory / MANIFEST_FILE).read_text()
    (directory / MANIFEST_FILE).write_text(text)
    with pytest.raises(PrismError, match=r"is damaged .*run the command that generated .* again, with --data"):
        FeatureCache(directory, target)
    regenerate(make_plan(target), never, directory)
    assert (directory / MANIFEST_FILE).read_text() == sound


def test_a_full_disk_at_the_end_loses_nothing(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        path.write_bytes(text[:9].encode())
        raise OSError(errno.ENOSPC, "full")

    directory = tmp_path / "cache"
    regenerate(make_plan(target), lambda: torch_engine(target), directory)
    (directory / MANIFEST_FILE).unlink()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(PrismError, match=r"cannot write .*cache\.json \(.*\): free space"):
            regenerate(make_plan(target), never, directory)
    assert {path.name for path in directory.iterdir()} == {PLAN_FILE, *shard_bytes(directory)}
    regenerate(make_plan(target), never, directory)
    assert len(FeatureCache(directory, target))


def test_what_a_killed_process_left_half_written_is_removed(target: Target, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    directory.mkdir()
    left = [directory / f".{name}.x1y2z3" for name in (PLAN_FILE, MANIFEST_FILE, "shard-00000.safetensors")]
    for path in left:
        path.write_text("x")
    regenerate(make_plan(target), lambda: torch_engine(target), directory)
    left[1].write_text("x")
    (directory / MANIFEST_FILE).unlink()
    regenerate(make_plan(target), never, directory)
    assert not any(path.exists() for path in left)
    regenerate(make_plan(target), never, directory)
    assert set(FeatureCache(directory, target).manifest["files"]) == {PLAN_FILE, *shard_bytes(directory)}


@pytest.mark.parametrize("layers", [(2,), ()])
def test_a_shard_without_a_usable_answer(layers: tuple[int, ...], target: Target, tmp_path: Path) -> None:
    directory, features = tmp_path / "cache", "last" if layers else "none"
    plan = dataclasses.replace(make_plan(target), feature_layers=layers)
    regenerate(plan, lambda: torch_engine(target), directory)
    full = FeatureCache(directory, target, features)  # type: ignore[arg-type]
    short = FeatureSequence(torch.tensor([5, 6, 7]), torch.zeros(2, 64 * len(layers)), prompt_length=2, greedy=True)
    regenerate_module._write(shard_path(directory, 1), dict.fromkeys(range(8, 16), short))
    (directory / MANIFEST_FILE).unlink()
    regenerate(plan, never, directory)
    cache = FeatureCache(directory, target, features)  # type: ignore[arg-type]
    assert cache.manifest["counts"]["too_short"] == 8 + full.manifest["counts"]["too_short"]
    assert len(cache) + cache.manifest["counts"]["too_short"] == 20
    last = cache.sequence(len(cache) - 1)
    assert torch.equal(last.tokens, full.sequence(len(full) - 1).tokens)
    assert last.features.shape == (len(last.tokens) - 1, 64 * len(layers))
    everywhere = cache.token_counts(np.arange(len(cache)), 320)
    assert everywhere.sum() == cache.manifest["counts"]["tokens"]
    assert inspect_path(directory).sound


def test_no_usable_answer_at_all_is_said(target: Target, tmp_path: Path) -> None:
    silent = ending_at(target, tuple(range(320)))
    for _ in range(2):
        with pytest.raises(PrismError, match="every answer of the target has fewer than two tokens"):
            regenerate(make_plan(silent), lambda: torch_engine(silent), tmp_path / "cache")
    assert len(shard_bytes(tmp_path / "cache")) == 3


def test_answers_without_a_row_to_learn_from_are_left_out(tmp_path: Path, target: Target) -> None:
    directory = tmp_path / "cache"
    plan = make_plan(target)
    regenerate(plan, lambda: torch_engine(target), directory, answers=5)
    short = FeatureSequence(torch.tensor([5, 6, 7]), torch.zeros(2, 64), prompt_length=2, greedy=True)
    full = FeatureSequence(torch.tensor([5, 6, 7, 8]), torch.zeros(3, 64), prompt_length=2, greedy=True)
    regenerate_module._write(shard_path(directory, 0), {0: short, 1: full})
    (directory / MANIFEST_FILE).unlink()
    regenerate_module._seal(plan, directory)
    cache = FeatureCache(directory, target)
    assert cache.sequence(0).tokens.tolist() == [5, 6, 7, 8]
    assert (len(cache), cache.manifest["counts"]["too_short"]) == (1, 1)


def test_token_counts_cover_the_chosen_sequences(target: Target, tmp_path: Path) -> None:
    regenerate(make_plan(target), lambda: torch_engine(target), tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache", target)
    chosen = np.array([0, 9, len(cache) - 1])
    expected = np.zeros(320, dtype=np.int64)
    for index in chosen:
        for token in cache.sequence(int(index)).tokens.tolist():
            expected[token] += 1
    assert np.array_equal(cache.token_counts(chosen, 320), expected)


def test_a_cache_of_another_target_a_truncated_and_a_missing_one_are_refused(target: Target, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    regenerate(make_plan(target), lambda: torch_engine(target), directory)
    with pytest.raises(PrismError, match="another target or tokenizer"):
        FeatureCache(directory, tiny_target(rms_norm_eps=1e-4))
    with pytest.raises(PrismError, match="not a directory"):
        FeatureCache(tmp_path / "missing", target)
    path = shard_path(directory, 1)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(PrismError, match="bytes instead of"):
        FeatureCache(directory, target)


def test_features_keep_the_dtype_of_the_cache(tmp_path: Path, target: Target) -> None:
    sequence = FeatureSequence(torch.arange(4), torch.randn(3, 64), 2, False)
    write_shard(tmp_path / "x.safetensors", [sequence], {"answered": "1", "too_short": "0"})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("features"), sequence.features.bfloat16())
        assert file.get_tensor("greedy").tolist() == [False]
