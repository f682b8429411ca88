"""The drafter's networks, walked, against the PyTorch drafter and the generic tree loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prism_trt.config import TreeShape
from prism_trt.convert.walker import make_walker_engine
from prism_trt.drafter.model import Drafter
from prism_trt.engines.protocol import Engine, FusedDraftEngine, TokenBatch, Tree
from prism_trt.speculative.tree import grow_tree_stepwise
from prism_trt.target.loading import Target
from tests.convert.compare import LIMITS, assert_as_exact, assert_close, following, reference, round_weights, words
from tests.tiny import DRAFTERS, tiny_drafter, tiny_target


def models(kind: str, **overrides: Any) -> tuple[Target, Drafter]:
    target = tiny_target()
    return target, tiny_drafter(target, **DRAFTERS[kind], **overrides)


def draft_inputs() -> tuple[TokenBatch, Tensor]:
    """Two rows around an idle slot, one of them padded."""
    features = torch.randn(2, 4, 192, generator=torch.Generator().manual_seed(1))
    return following(words(2, 4, seed=0), [2, 0], [0, 0], [4, 2]), features


def step_logits(engine: Engine, features: Tensor) -> list[Tensor]:
    """Logits of `extend` and of four more steps over two nodes, each a child of one in the step before."""
    batch, _ = draft_inputs()
    output = engine.extend(batch, features)
    logits = [output.logits.clone()]
    hidden = output.hidden.expand(-1, 2, -1)
    committed = batch.lengths + batch.counts
    tokens = words(5, 2, 2, seed=3)
    own = torch.eye(2, dtype=torch.bool).expand(2, 2, 2)
    for k in range(1, 5):
        positions = (committed - 1 + k)[:, None].expand(2, 2)
        counts = torch.tensor([2, 2])
        mask = own.repeat(1, 1, k)
        level = TokenBatch(tokens[k], positions, batch.slots, committed, counts, mask, offset=2 * (k - 1))
        output = engine.step(k, level, hidden)
        logits.append(output.logits.clone())
        hidden = output.hidden
    return logits


def own_features(drafter: Drafter, features: Tensor) -> tuple[Tensor, Tensor]:
    """The same features as the PyTorch engine reads them (unfused) and as the networks do."""
    if drafter.fusion is None:
        return features[..., :64], features[..., :64]
    return features, drafter.fuse_features(features)


@pytest.mark.parametrize("kind", DRAFTERS)
def test_steps_equal_the_drafter(trt: Any, kind: str) -> None:
    target, drafter = models(kind)
    raw, fused = own_features(drafter, draft_inputs()[1])
    expected = step_logits(reference(target, drafter), raw)
    actual = step_logits(make_walker_engine(trt, target, drafter, LIMITS, torch.float32), fused)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_in_half_precision_are_as_exact_as_pytorch(trt: Any, dtype: torch.dtype) -> None:
    target, drafter = models("three modules")
    round_weights(target.model, dtype)
    round_weights(drafter, dtype)
    features = draft_inputs()[1][..., :64].to(dtype)
    engines = (
        make_walker_engine(trt, target, drafter, LIMITS, dtype),
        reference(target, drafter, dtype),
        reference(target, drafter),
    )
    for actual, rounded, expected in zip(*(step_logits(engine, features) for engine in engines), strict=True):
        assert_as_exact(actual, rounded, expected)


def assert_same_tree(actual: Tree, expected: Tree) -> None:
    for name in ("tokens", "parents", "depths", "mask"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    scale = max(1.0, float(expected.log_probs.abs().max()))
    torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=1e-5 * scale)


def grown(trt: Any, target: Target, drafter: Drafter, tree: str) -> tuple[Tree, Tree]:
    """The tree of the round network, and that of the generic loop over PyTorch."""
    shape = TreeShape.parse(tree)
    batch, features = draft_inputs()
    raw, fused = own_features(drafter, features)
    engine = make_walker_engine(trt, target, drafter, LIMITS, torch.float32, shape)
    assert isinstance(engine, FusedDraftEngine)
    return engine.draft_round(batch, fused, shape), grow_tree_stepwise(reference(target, drafter), batch, raw, shape)


@pytest.mark.parametrize("kind", DRAFTERS)
def test_round_grows_the_tree_of_the_generic_loop(trt: Any, kind: str) -> None:
    assert_same_tree(*grown(trt, *models(kind), "12/4/4"))


@pytest.mark.parametrize("tree", ["2/1/1", "6/1/5", "5/4/1", "11/3/2", "12/10/3"])
def test_round_grows_trees_of_any_shape(trt: Any, tree: str) -> None:
    assert_same_tree(*grown(trt, *models("two modules", draft_vocab_size=None), tree))


@pytest.mark.parametrize("scale", [0.0, 1e4], ids=["all words tie", "one word is certain"])
def test_round_breaks_ties_by_the_rules(trt: Any, scale: float) -> None:
    """With a certain word a child scores exactly what its parent does, and must not be kept without it."""
    target, drafter = models("standard")
    assert drafter.lm_head is not None
    drafter.lm_head.weight.data *= scale
    actual, expected = grown(trt, target, drafter, "8/3/4")
    assert bool((expected.log_probs[:, 1:] == 0).any()) == (scale > 0)
    assert_same_tree(actual, expected)


def test_other_trees_are_drafted_step_by_step(trt: Any) -> None:
    target, drafter = models("two modules")
    batch, features = draft_inputs()
    engine = make_walker_engine(trt, target, drafter, LIMITS, torch.float32, TreeShape.parse("6/1/5"))
    assert isinstance(engine, FusedDraftEngine)
    other = TreeShape.parse("5/2/3")
    actual = engine.draft_round(batch, features[..., :64], other)
    assert_same_tree(actual, grow_tree_stepwise(reference(target, drafter), batch, features[..., :64], other))
