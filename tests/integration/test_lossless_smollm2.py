"""Losslessness on SmolLM2-135M-Instruct: the compiled engine with the shipped drafter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from prism_trt.build import build_engine
from prism_trt.config import TreeShape
from prism_trt.engines.loading import load_engine, load_engine_tokenizer
from prism_trt.engines.protocol import Engine, TokenBatch
from prism_trt.quickstart.artifacts import SHIPPED
from prism_trt.speculative.decoder import Request, generate
from prism_trt.speculative.sampling import SamplingParams, warp
from prism_trt.target.tokenizer import Tokenizer

PROMPTS = Path(__file__).parents[2] / "prism_trt" / "quickstart" / "prompts.jsonl"


@pytest.fixture(scope="module")
def engine_directory(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "engine"
    manifest = build_engine(target=smollm2_path, drafter=SHIPPED, out=out, slots=16)
    assert manifest.runtime == "cpp"
    return out


@pytest.fixture(scope="module")
def engine(engine_directory: Path) -> Iterator[Engine]:
    yield load_engine(engine_directory)


@pytest.fixture(scope="module")
def tokenizer(engine_directory: Path) -> Tokenizer:
    return load_engine_tokenizer(engine_directory)


def chats(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    lines = PROMPTS.read_text().splitlines()
    texts = [json.loads(line)["prompt"] for line in lines[:: len(lines) // count]][:count]
    assert len(texts) == count
    return [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]


def test_greedy_output_is_identical(engine: Engine, tokenizer: Tokenizer) -> None:
    """60 prompts x 128 tokens: plain decoding one request at a time against several trees, alone and in batches."""
    prompts = chats(tokenizer, 60)
    eos = tokenizer.eos_token_ids

    def run(group: list[list[int]], tree: TreeShape | None) -> list[list[int]]:
        return [
            result.tokens for result in generate(engine, [Request(p, 128, eos_token_ids=eos, tree=tree) for p in group])
        ]

    plain = [run([prompt], None)[0] for prompt in prompts]
    assert sum(map(len, plain)) > 60 * 64
    assert [run([prompt], engine.default_tree)[0] for prompt in prompts] == plain
    for first, tree in zip(range(0, 60, 15), ("6/1/5", "16/4/6", "32/8/6", "60/10/6"), strict=True):
        assert run(prompts[first : first + 15], TreeShape.parse(tree)) == plain[first : first + 15]


def _exact(engine: Engine, prompt: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The target's distribution of the next three tokens, by running every continuation through the engine."""
    zero = torch.zeros(1, dtype=torch.int64)

    def following(tokens: tuple[int, ...]) -> list[tuple[int, float]]:
        sequence = torch.tensor([prompt + list(tokens)])
        length = sequence.shape[1]
        batch = TokenBatch(sequence, torch.arange(length)[None], zero, zero, zero + length)
        logits = engine.forward(batch, "last").logits
        assert logits is not None
        probabilities = warp(logits[0], params)[0]
        return [(int(i), float(probabilities[i])) for i in probabilities.nonzero()[:, 0]]

    return {
        (a, b, c): pa * pb * pc for a, pa in following(()) for b, pb in following((a,)) for c, pc in following((a, b))
    }


@pytest.mark.parametrize(("temperature", "tree"), [(1.0, "8/4/4"), (0.7, "6/1/5")])
def test_sampled_output_has_the_targets_distribution(
    engine: Engine, tokenizer: Tokenizer, temperature: float, tree: str
) -> None:
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Name an animal."}])
    exact = _exact(engine, prompt, SamplingParams(temperature=temperature, top_k=3))
    draws = 1000
    requests = [
        Request(prompt, 3, SamplingParams(temperature=temperature, top_k=3, seed=seed), tree=TreeShape.parse(tree))
        for seed in range(draws)
    ]
    counts = dict.fromkeys(exact, 0)
    for result in generate(engine, requests):
        counts[tuple(result.tokens)] += 1  # a KeyError here is a token the target can never produce
    expected = np.array([exact[key] for key in exact]) * draws
    observed = np.array([counts[key] for key in exact])
    rare = expected < 5
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3
