"""Regeneration and the cache it fills: what is stored is what the target says and computes."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from prism_trt.config import GenerationConfig
from prism_trt.data import regenerate as regenerate_module
from prism_trt.data.feature_cache import MANIFEST_FILE, FeatureCache, shard_path, write_shard
from prism_trt.data.regenerate import GenerationPlan, GenerationProgress, plan_generation, regenerate
from prism_trt.data.sequences import FeatureSequence
from prism_trt.drafter.features import captured_layers
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from prism_trt.target.loading import Target
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
    regenerate(plan, lambda: torch_engine(target), tmp_path / "cache", answers=5)
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

    def refuse() -> TorchEngine:
        raise AssertionError("nothing is missing")

    regenerate(plan, refuse, tmp_path / "cache")


@pytest.mark.parametrize(("changes", "key"), [({"temperature": 0.9}, "settings"), ({"count": 19}, "prompts")])
def test_a_cache_of_other_options_is_refused(
    changes: dict[str, float], key: str, target: Target, tmp_path: Path
) -> None:
    regenerate(make_plan(target), lambda: torch_engine(target), tmp_path / "cache", answers=5)
    with pytest.raises(PrismError, match=f"another {key}"):
        regenerate(make_plan(target, **changes), lambda: torch_engine(target), tmp_path / "cache")  # type: ignore[arg-type]


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
    assert shard_bytes(tmp_path / "cache") == {}


def test_a_context_too_short_for_prompt_and_answer_is_refused(target: Target, tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="lower --max-prompt-tokens"):
        regenerate(make_plan(target, max_new_tokens=60), lambda: torch_engine(target), tmp_path / "cache")


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
