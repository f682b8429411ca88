"""The target's network, walked, against the PyTorch model over the same K/V pool."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prism_trt.config import RopeScaling
from prism_trt.convert.walker import make_walker_engine
from prism_trt.engines.protocol import TokenBatch
from prism_trt.errors import PrismError
from tests.convert.compare import LIMITS, assert_as_exact, assert_close, following, reference, round_weights, words
from tests.tiny import tiny_drafter, tiny_target

SCALING = RopeScaling(factor=4, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=64)
UNTIED = {"tie_word_embeddings": False, "qkv_bias": True, "rope_scaling": SCALING, "num_kv_heads": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("overrides", [{}, UNTIED], ids=["tied", "untied, bias, llama3 rope"])
def test_prefill_tree_and_commit_equal_the_model(trt: Any, dtype: torch.dtype, overrides: dict[str, Any]) -> None:
    """Slots 2 and 0, so that slot 1 is idle between them; the pools are compared through what is read from them."""
    target = tiny_target(**overrides)
    round_weights(target.model, dtype)
    walked = make_walker_engine(trt, target, None, LIMITS, dtype)
    slots, lengths = torch.tensor([2, 0]), torch.tensor([20, 5])
    parents = torch.tensor([0, 0, 0, 1, 3])
    mask = torch.eye(5, dtype=torch.bool)
    for node in range(1, 5):
        mask[node] |= mask[parents[node]]
    tree = TokenBatch(
        words(2, 5, seed=2),
        lengths[:, None] + mask.sum(1) - 1,
        slots,
        lengths,
        torch.tensor([5, 5]),
        mask.expand(2, 5, 5),
    )
    results = []
    for engine in (walked, reference(target, None, dtype), reference(target, None)):
        # Too long to share a call, then two of different lengths that do.
        engine.forward(following(words(1, 16, seed=0), [2], [0], [16]), "none")
        prompt = engine.forward(following(words(2, 5, seed=1), [2, 0], [16, 0], [4, 5]), "last")
        verified = engine.forward(tree)
        engine.commit(slots, lengths, torch.tensor([[0, 1, 3], [0, 2, 4]]), torch.tensor([3, 2]))
        after = engine.forward(following(words(2, 1, seed=3), [2, 0], [23, 7], [1, 1]))
        results.append((prompt.logits, verified.logits, verified.features, after.logits))
        assert verified.greedy is not None and verified.logits is not None
        assert torch.equal(verified.greedy, verified.logits.argmax(-1))
    for actual, rounded, expected in zip(*results, strict=True):
        if dtype == torch.float32:
            assert_close(actual, expected)
        else:
            assert_as_exact(actual, rounded, expected)


def test_features_of_several_layers_come_fused(trt: Any) -> None:
    target = tiny_target()
    drafter = tiny_drafter(target, features="multi", feature_layers=(0, 1, 2))
    batch = following(words(1, 6, seed=0), [1], [0], [6])
    expected = drafter.fuse_features(reference(target, drafter).forward(batch).features)
    walked = make_walker_engine(trt, target, drafter, LIMITS, torch.float32)
    assert walked.feature_size == walked.hidden_size == 64
    assert_close(walked.forward(batch).features, expected)


def test_mistakes_are_refused(trt: Any) -> None:
    engine = make_walker_engine(trt, tiny_target(), None, LIMITS, torch.float32)
    with pytest.raises(PrismError, match="limit is 32"):
        engine.forward(following(words(1, 33, seed=0), [0], [0], [33]))
    with pytest.raises(PrismError, match="context has 64"):
        engine.forward(following(words(1, 5, seed=0), [0], [60], [5]))
    with pytest.raises(ValueError, match="share a slot"):
        engine.forward(following(words(2, 1, seed=0), [1, 1], [0, 0], [1, 1]))
    with pytest.raises(ValueError, match="3 slots"):
        engine.forward(following(words(1, 1, seed=0), [3], [0], [1]))
    with pytest.raises(ValueError, match="no drafter"):
        engine.extend(following(words(1, 1, seed=0), [0], [0], [1]), torch.zeros(1, 1, 64))
