"""The torch engine: its pool, masks and commits against whole sequences, and the drafter against recomputation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prism_trt.drafter.model import Drafter
from prism_trt.engines.protocol import Engine, EngineLimits, TokenBatch
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from prism_trt.target.loading import Target
from prism_trt.target.model import attend
from tests.tiny import tiny_drafter, tiny_target

CPU = torch.device("cpu")
LIMITS = EngineLimits(slots=3, context=64, tokens_per_call=48)


def draw_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 320, shape, generator=torch.Generator().manual_seed(seed))


def given(value: Tensor | None) -> Tensor:
    """`value`, which the call under test must have returned."""
    assert value is not None
    return value


def rows(tokens: Tensor, slots: list[int], lengths: list[int], counts: list[int] | None = None) -> TokenBatch:
    start = torch.tensor(lengths)
    valid = torch.tensor(counts or [tokens.shape[1]] * len(slots))
    return TokenBatch(tokens, start[:, None] + torch.arange(tokens.shape[1]), torch.tensor(slots), start, valid)


def make_engine(dtype: torch.dtype = torch.float32, modules: int = 2) -> tuple[Target, Drafter, TorchEngine]:
    target = tiny_target()
    drafter = tiny_drafter(target, modules)
    return target, drafter, TorchEngine(target, drafter, LIMITS, CPU, dtype)


def test_it_implements_the_protocol() -> None:
    target, drafter, engine = make_engine()
    assert isinstance(engine, Engine)
    assert engine.has_drafter and torch.equal(given(engine.draft_vocab), given(drafter.draft_vocab))
    assert not TorchEngine(target, None, LIMITS, CPU).has_drafter


def test_logits_for_selects_rows() -> None:
    _, _, engine = make_engine()
    batch = rows(draw_tokens(2, 7), [2, 0], [0, 0], [4, 7])
    whole = engine.forward(batch)
    last = engine.forward(batch, "last")
    for row, count in enumerate([4, 7]):
        torch.testing.assert_close(given(last.logits)[row, 0], given(whole.logits)[row, count - 1])
    assert torch.equal(given(last.greedy), given(last.logits).argmax(-1))
    none = engine.forward(batch, "none")
    assert none.logits is None and none.greedy is None


@pytest.mark.parametrize("slots", [[0, 1], [1, 0], [2, 0]])
def test_chunks_in_any_slots_equal_one_pass(slots: list[int]) -> None:
    target, _, engine = make_engine()
    tokens = draw_tokens(2, 20, seed=1)
    expected = target.model.head(target.model.forward_sequence(tokens))
    done = [0, 0]
    for counts in ([6, 6], [1, 1], [3, 9], [10, 4]):
        longest = max(counts)
        padded = torch.zeros(2, longest, dtype=torch.int64)
        for row, count in enumerate(counts):
            padded[row, :count] = tokens[row, done[row] : done[row] + count]
        output = engine.forward(rows(padded, slots, done, counts))
        for row, count in enumerate(counts):
            part = expected[row, done[row] : done[row] + count]
            torch.testing.assert_close(given(output.logits)[row, :count], part, rtol=1e-4, atol=1e-4)
        done = [n + count for n, count in zip(done, counts, strict=True)]
    assert done == [20, 20]


def test_a_tree_in_levels_and_its_commit_equal_linear_decoding() -> None:
    """Two rows of different lengths; the tree comes in two calls, the second at offset 3."""
    target, _, engine = make_engine()
    prompts, paths, after = draw_tokens(2, 9, seed=2), draw_tokens(2, 3, seed=3), draw_tokens(2, 2, seed=4)
    lengths = [5, 9]
    slots = [2, 1]
    engine.forward(rows(prompts, slots, [0, 0], lengths), "none")
    noise = draw_tokens(2, 2, seed=5)
    start = torch.tensor(lengths)
    # Entries: 0 root, 1 noise, 2 child of 0, then 3 noise below 1 and 4 child of 2. The path is 0, 2, 4.
    first = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool().expand(2, 3, 3)
    second = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]).bool().expand(2, 2, 5)
    upper = torch.stack((paths[:, 0], noise[:, 0], paths[:, 1]), 1)
    lower = torch.stack((noise[:, 1], paths[:, 2]), 1)
    where = start[:, None]
    at = torch.tensor(slots)
    top = engine.forward(TokenBatch(upper, where + torch.tensor([0, 1, 1]), at, start, start * 0 + 3, first))
    low = engine.forward(TokenBatch(lower, where + 2, at, start, start * 0 + 2, second, 3))
    engine.commit(at, start, torch.tensor([[0, 2, 4], [0, 2, 4]]), torch.tensor([3, 3]))
    following = engine.forward(rows(after, slots, [n + 3 for n in lengths]))
    for row, length in enumerate(lengths):
        sequence = torch.cat((prompts[row, :length], paths[row], after[row]))[None]
        expected = target.model.head(target.model.forward_sequence(sequence))[0, length:]
        actual = torch.cat((given(top.logits)[row, [0, 2]], given(low.logits)[row, [1]], given(following.logits)[row]))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_padding_of_a_tree_is_finite() -> None:
    _, _, engine = make_engine()
    mask = torch.zeros(2, 3, 3, dtype=torch.bool)
    mask[:, 0, 0] = True
    batch = TokenBatch(
        draw_tokens(2, 3),
        torch.zeros(2, 3).long(),
        torch.tensor([0, 1]),
        torch.zeros(2).long(),
        torch.ones(2).long(),
        mask,
    )
    assert given(engine.forward(batch).logits).isfinite().all()


def recompute(target: Target, drafter: Drafter, tokens: Tensor, features: Tensor, steps: int) -> list[Tensor]:
    """Logits of step 0 at the last committed entry and of a greedy chain, each from scratch, by the K/V rules."""
    committed = tokens.shape[1]
    words, hidden = tokens, features
    keys, values, logits = [], [], []
    for k in range(steps):
        module = drafter.module(k)
        (layer,) = module.stack
        count = words.shape[1]
        first = 0 if k == 0 else committed + k - 1
        x = module.fuse(target.model.model.embed_tokens(words), hidden)
        positions = torch.arange(first, first + count)[None]
        q, (key, value) = layer.query(x, positions), layer.key_value(x, positions)
        keys.append(key)
        values.append(value)
        all_keys, all_values = (torch.cat(parts, 1).transpose(1, 2) for parts in (keys, values))
        mask = torch.ones(count, all_keys.shape[2], dtype=torch.bool).tril(first)[None, None]
        hidden = layer.finish(x, attend(q, all_keys, all_values, mask))[:, -1:]
        logits.append(hidden @ drafter.head_rows(target.model.head_weight).T)
        words = given(drafter.draft_vocab)[logits[-1].argmax(-1)]
    return logits


@pytest.mark.parametrize("chunks", [[9], [4, 5], [1, 8]])
def test_incremental_drafting_equals_recomputation(chunks: list[int]) -> None:
    target, drafter, engine = make_engine(modules=3)
    tokens, features = draw_tokens(1, 9, seed=6), torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(7))
    expected = recompute(target, drafter, tokens, features, steps=5)
    at = 0
    for count in chunks:
        output = engine.extend(rows(tokens[:, at : at + count], [1], [at]), features[:, at : at + count])
        at += count
    torch.testing.assert_close(given(output.logits), expected[0], rtol=1e-4, atol=1e-4)
    for k in range(1, 5):
        word = given(drafter.draft_vocab)[given(output.logits).argmax(-1)]
        mask = torch.ones(1, 1, k, dtype=torch.bool)
        one = torch.ones(1, dtype=torch.int64)
        batch = TokenBatch(word, (one * (8 + k))[:, None], one, one * 9, one, mask, offset=k - 1)
        output = engine.step(k, batch, output.hidden)
        torch.testing.assert_close(given(output.logits), expected[k], rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close_to_float32() -> None:
    _, _, exact = make_engine()
    _, _, rounded = make_engine(torch.bfloat16)
    batch = rows(draw_tokens(1, 30, seed=8), [0], [0])
    expected, actual = exact.forward(batch), rounded.forward(batch)
    assert actual.features.dtype == torch.bfloat16 and given(actual.logits).dtype == torch.float32
    scale = float(given(expected.logits).abs().max())
    torch.testing.assert_close(given(actual.logits), given(expected.logits), rtol=0, atol=0.05 * scale)


def test_mistakes_are_refused() -> None:
    target, _, engine = make_engine()
    with pytest.raises(PrismError, match="context has 64"):
        engine.forward(rows(draw_tokens(1, 5), [0], [60]))
    with pytest.raises(PrismError, match="limit is 48"):
        engine.forward(rows(draw_tokens(1, 49), [0], [0]))
    with pytest.raises(ValueError, match="share a slot"):
        engine.forward(rows(draw_tokens(2, 1), [1, 1], [0, 0]))
    with pytest.raises(ValueError, match="3 slots"):
        engine.forward(rows(draw_tokens(1, 1), [3], [0]))
    with pytest.raises(PrismError, match="512 positions"):
        TorchEngine(target, None, EngineLimits(1, 513, 8), CPU)
    with pytest.raises(ValueError, match="no drafter"):
        TorchEngine(target, None, LIMITS, CPU).extend(rows(draw_tokens(1, 1), [0], [0]), torch.zeros(1, 1, 64))
