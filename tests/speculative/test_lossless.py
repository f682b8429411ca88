"""Speculative decoding of small random LLaMA models on the torch engine.

The target's next token is made to depend mostly on its last one and the drafter to pass that one's embedding through,
so that trees are accepted to all depths.
"""

from __future__ import annotations

import pytest
import torch

from prism_trt.config import TreeShape
from prism_trt.engines.protocol import EngineLimits
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.speculative.decoder import Request, Result, generate
from prism_trt.speculative.sampling import SamplingParams
from prism_trt.speculative.stopping import TextStream
from prism_trt.target.detokenize import DetokenizerStream
from prism_trt.target.loading import Target
from tests.tiny import tiny_drafter, tiny_target

TREES = [
    TreeShape(depth=4, width=1, size=5),
    TreeShape(depth=3, width=3, size=10),
    TreeShape(depth=5, width=4, size=24),
]


@pytest.fixture(scope="module")
def target() -> Target:
    target = tiny_target(0, tie_word_embeddings=False)
    for name, parameter in target.model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.mul_(0.1)
    return target


def make_engine(target: Target, slots: int = 4, tokens_per_call: int = 128, modules: int = 2) -> TorchEngine:
    limits = EngineLimits(slots, 160, tokens_per_call)
    drafter = tiny_drafter(target, modules=modules, draft_vocab_size=300)
    for name, parameter in drafter.named_parameters():
        if "fc.weight" in name:
            parameter.mul_(0.2)
            parameter[:, : len(parameter)] += torch.eye(len(parameter))
        elif "o_proj" in name or "down_proj" in name:
            parameter.mul_(0.1)
    return TorchEngine(target, drafter, limits, torch.device("cpu"), torch.float32)


def prompts(target: Target, count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    return [torch.randint(0, target.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def tokens_of(results: list[Result]) -> list[list[int]]:
    return [result.tokens for result in results]


@pytest.mark.parametrize("modules", [1, 2, 3])
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_greedy_speculative_equals_vanilla(target: Target, tree: TreeShape, modules: int) -> None:
    inputs = prompts(target, 12, seed=modules)
    engine = make_engine(target, modules=modules)
    vanilla = tokens_of(generate(engine, [Request(prompt, 30) for prompt in inputs]))
    requests = [Request(prompt, 30, tree=tree) for prompt in inputs]
    results = generate(engine, requests)
    assert tokens_of(results) == vanilla
    accepted = {n for result in results for n, passes in enumerate(result.statistics.accepted_counts) if passes}
    assert accepted >= {0, 1, 2, 3}
    one_by_one = make_engine(target, slots=1, tokens_per_call=24, modules=modules)
    assert tokens_of(generate(one_by_one, requests)) == vanilla


def test_mixed_batches_give_what_each_request_gives_alone(target: Target) -> None:
    engine = make_engine(target)
    requests = [
        Request(prompt, 8 + i, SamplingParams(temperature=0.9 * (i % 2), top_k=20, seed=i), tree=[None, *TREES][i % 4])
        for i, prompt in enumerate(prompts(target, 12, seed=9))
    ]
    together = tokens_of(generate(engine, requests))
    assert together == [generate(engine, [request])[0].tokens for request in requests]


@pytest.mark.parametrize("tree", [None, *TREES], ids=str)
def test_collected_features_are_those_of_a_full_pass(target: Target, tree: TreeShape | None) -> None:
    engine = make_engine(target, tokens_per_call=32)
    inputs = prompts(target, 5, seed=4)
    requests = [Request(prompt, 25, tree=tree, collect_features=True) for prompt in inputs]
    for prompt, result in zip(inputs, generate(engine, requests), strict=True):
        sequence = torch.tensor([(prompt + result.tokens)[:-1]])
        with torch.no_grad():
            expected = target.model.forward_sequence(sequence)[0]
        assert result.features is not None
        assert result.features.shape == expected.shape
        torch.testing.assert_close(result.features.float(), expected.float(), atol=0.01, rtol=0.01)


@pytest.mark.parametrize("tree", [None, *TREES], ids=str)
def test_stop_words_end_at_the_token_that_completes_them(target: Target, tree: TreeShape | None) -> None:
    engine = make_engine(target)
    tokenizer = target.tokenizer
    tried = 0
    for prompt in prompts(target, 6, seed=5):
        whole = generate(engine, [Request(prompt, 40)])[0].tokens
        text = tokenizer.decode(whole)
        for start in range(0, len(text) - 3, 7):
            word = text[start : start + 3]
            if not word.isascii():
                continue
            tried += 1
            result = generate(engine, [Request(prompt, 40, stop_words=(word,), tree=tree)], tokenizer)[0]
            # The text of a token that ends inside a character comes with the next one.
            texts = [tokenizer.decode(whole[:n]) for n in range(41)]
            needed = next(n for n, seen in enumerate(texts) if word in seen and not seen.endswith("\ufffd"))
            assert result.tokens == whole[:needed]
            assert result.finish_reason == "stop"
            stream = TextStream(DetokenizerStream(tokenizer), (word,))
            shown = stream.push(result.tokens) + stream.flush()
            assert shown == text[: text.index(word)]
    assert tried > 10


def test_a_real_tokens_text_is_streamed_whole(target: Target) -> None:
    tokenizer = target.tokenizer
    text = "Grüße, 世界! 🎉 Done."
    stream = TextStream(DetokenizerStream(tokenizer), ("Nothing",))
    deltas = [stream.push([token]) for token in tokenizer.encode(text)] + [stream.flush()]
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)
