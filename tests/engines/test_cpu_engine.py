"""The compiled engine: agreement with torch, and the same bits whatever the shape of the call."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prism_trt.config import TreeShape
from prism_trt.engines.cpu.engine import CpuEngine
from prism_trt.engines.cpu.files import DRAFT_VOCAB, LIBRARY, WEIGHTS, open_files, open_temporary, write_files
from prism_trt.engines.cpu.library import ISAS, Isa, compile_library, cpu_flags, find_compiler
from prism_trt.engines.cpu.packing import packed_tensors, write_weights
from prism_trt.engines.protocol import DraftOutput, EngineLimits, TargetOutput, TokenBatch
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from prism_trt.speculative.tree import grow_tree
from prism_trt.speculative.verify import verify_greedy
from tests.tiny import DRAFTERS, tiny_drafter, tiny_target

LIMITS = EngineLimits(slots=4, context=160, tokens_per_call=64)
RUNNABLE = [isa for isa in ISAS if isa.cpu_flags <= cpu_flags()]


@cache
def open_engine(isa: Isa = RUNNABLE[0], threads: int = 2, qkv_bias: bool = False) -> CpuEngine:
    compiler = find_compiler()
    assert compiler is not None, "the tests of the compiled engine need g++"
    target = tiny_target(seed=3, qkv_bias=qkv_bias)
    return open_temporary(target, tiny_drafter(target, seed=4), LIMITS, threads, isa, compiler)


@pytest.fixture(scope="module")
def compiled_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / LIBRARY
    compile_library(path, RUNNABLE[0], find_compiler() or "g++")
    return path


@pytest.fixture(scope="module", params=RUNNABLE, ids=lambda isa: isa.name)
def engine(request: pytest.FixtureRequest) -> Iterator[CpuEngine]:
    built = open_engine(request.param)
    assert built.isa == request.param.name
    yield built


def row_batch(
    tokens: list[int], length: int = 0, slot: int = 0, mask: torch.Tensor | None = None, positions=None
) -> TokenBatch:
    n = len(tokens)
    positions = torch.arange(length, length + n) if positions is None else positions
    one = torch.ones(1, dtype=torch.int64)
    return TokenBatch(torch.tensor([tokens]), positions.view(1, n), one * slot, one * length, one * n, mask)


def random_tokens(count: int, seed: int, vocab: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(vocab) for _ in range(count)]


def one_by_one(engine: CpuEngine, tokens: list[int], slot: int = 0) -> TargetOutput:
    outputs = [engine.forward(row_batch([token], i, slot)) for i, token in enumerate(tokens)]
    # logits are views of a reused buffer, so they are taken in a second, separate pass
    logits = [engine.forward(row_batch([token], i, slot)).logits.clone() for i, token in enumerate(tokens)]
    return TargetOutput(
        torch.cat([o.features for o in outputs], 1), torch.cat(logits, 1), torch.cat([o.greedy for o in outputs], 1)
    )


def assert_same_bits(a: TargetOutput, b: TargetOutput) -> None:
    assert torch.equal(a.features, b.features)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.greedy, b.greedy)


def assert_close_in_norm(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within what bf16 weights and activations (8 bits of mantissa) cost over two layers of large random weights."""
    assert (actual.float() - expected.float()).norm() < 0.04 * expected.float().norm()


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_agrees_with_torch(qkv_bias: bool) -> None:
    target = tiny_target(seed=3, qkv_bias=qkv_bias)
    reference = TorchEngine(target, None, LIMITS, torch.device("cpu"), torch.float32)
    batch = row_batch(random_tokens(60, 1, target.config.vocab_size))
    expected, actual = reference.forward(batch), open_engine(qkv_bias=qkv_bias).forward(batch)
    assert_close_in_norm(actual.logits, expected.logits)
    assert_close_in_norm(actual.features, expected.features)
    assert torch.equal(actual.greedy, actual.logits.argmax(-1))


@pytest.mark.parametrize("shape", DRAFTERS)
def test_drafter_agrees_with_torch(shape: str, compiled_library: Path, tmp_path: Path) -> None:
    target = tiny_target(seed=3)
    drafter = tiny_drafter(target, seed=4, **DRAFTERS[shape])
    reference = TorchEngine(target, drafter, LIMITS, torch.device("cpu"), torch.float32)
    (tmp_path / LIBRARY).symlink_to(compiled_library)
    write_weights(tmp_path / WEIGHTS, packed_tensors(target, drafter, LIMITS.context))
    assert drafter.draft_vocab is not None
    save_file({"draft_vocab": drafter.draft_vocab}, tmp_path / DRAFT_VOCAB)
    compiled = open_files(tmp_path, target.config, drafter.config, LIMITS, threads=2)
    assert compiled.feature_size == reference.feature_size
    tokens = random_tokens(12, 2, target.config.vocab_size)
    expected, actual = (e.forward(row_batch(tokens), "none").features for e in (reference, compiled))
    assert_close_in_norm(actual, expected)
    features = torch.randn(1, 12, compiled.feature_size).bfloat16()
    expected, actual = (e.extend(row_batch(tokens), features) for e in (reference, compiled))
    assert_close_in_norm(actual.logits, expected.logits)
    mask = torch.eye(3, dtype=torch.bool).view(1, 3, 3)
    step = row_batch(random_tokens(3, 5, target.config.vocab_size), 12, mask=mask, positions=torch.full((3,), 12))
    hidden = expected.hidden.bfloat16().expand(1, 3, -1)
    expected, actual = (e.step(1, step, hidden) for e in (reference, compiled))
    assert_close_in_norm(actual.logits, expected.logits)
    assert_close_in_norm(actual.hidden, expected.hidden)


@pytest.mark.parametrize("chunks", [[60], [7, 53], [8, 9, 16, 27], [1, 2, 3, 4, 5, 6, 7, 32]])
def test_same_bits_for_any_chunking(engine: CpuEngine, chunks: list[int]) -> None:
    tokens = random_tokens(60, 1, engine.vocab_size)
    expected = one_by_one(engine, tokens)
    at = 0
    for count in chunks:
        actual = engine.forward(row_batch(tokens[at : at + count], at, slot=1))
        assert_same_bits(
            actual,
            TargetOutput(*(getattr(expected, name)[:, at : at + count] for name in ("features", "logits", "greedy"))),
        )
        at += count


@pytest.mark.parametrize("seed", range(6))
def test_same_bits_in_trees_and_after_commit(engine: CpuEngine, seed: int) -> None:
    """A path hidden in a random tree gives the bits of plain decoding, and so does what follows its commit."""
    generator = random.Random(seed)
    prompt = random_tokens(20 + seed, seed, engine.vocab_size)
    size = generator.choice([5, 8, 13, 16])
    parents = [0] + [generator.randrange(i) for i in range(1, size)]
    tree_tokens = random_tokens(size, seed + 100, engine.vocab_size)
    mask = torch.eye(size, dtype=torch.bool)
    for node in range(1, size):
        mask[node] |= mask[parents[node]]
    path = [generator.randrange(size // 2, size)]
    while path[0] != 0:
        path.insert(0, parents[path[0]])
    after = random_tokens(4, seed + 200, engine.vocab_size)

    expected = one_by_one(engine, prompt + [tree_tokens[node] for node in path] + after, slot=0)
    engine.forward(row_batch(prompt, slot=2), "none")
    n = len(prompt)
    tree = engine.forward(row_batch(tree_tokens, n, 2, mask.unsqueeze(0), n + mask.sum(1) - 1))
    assert torch.equal(tree.logits[:, path], expected.logits[:, n : n + len(path)])
    assert torch.equal(tree.features[:, path], expected.features[:, n : n + len(path)])
    one = torch.ones(1, dtype=torch.int64)
    engine.commit(one * 2, one * n, torch.tensor([path]), one * len(path))
    following = engine.forward(row_batch(after, n + len(path), 2))
    assert torch.equal(following.logits, expected.logits[:, n + len(path) :])


def test_same_bits_for_any_batch(engine: CpuEngine) -> None:
    rows = [random_tokens(count, count, engine.vocab_size) for count in (16, 3, 9)]
    alone = [one_by_one(engine, tokens, slot=3) for tokens in rows]
    padded = torch.zeros(3, 16, dtype=torch.int64)
    for b, tokens in enumerate(rows):
        padded[b, : len(tokens)] = torch.tensor(tokens)
    counts = torch.tensor([len(tokens) for tokens in rows])
    batch = TokenBatch(
        padded, torch.arange(16).repeat(3, 1), torch.tensor([2, 0, 1]), torch.zeros(3, dtype=torch.int64), counts
    )
    together = engine.forward(batch)
    for b, expected in enumerate(alone):
        assert torch.equal(together.logits[b, : counts[b]], expected.logits[0])
        assert torch.equal(together.features[b, : counts[b]], expected.features[0])
    last = engine.forward(batch, "last")
    for b, expected in enumerate(alone):
        assert torch.equal(last.logits[b, 0], expected.logits[0, -1])
        assert last.greedy[b, 0] == expected.greedy[0, -1]


def test_same_bits_for_any_thread_count() -> None:
    results = []
    for threads in (1, 2, 3):
        engine = open_engine(threads=threads)
        batch = row_batch(random_tokens(33, 7, engine.vocab_size))
        results.append(engine.forward(batch))
        assert_same_bits(results[0], results[-1])


def test_copied_prefixes_are_the_originals(engine: CpuEngine) -> None:
    first, shared = random_tokens(40, 11, engine.vocab_size), 21
    other = first[:shared] + random_tokens(9, 12, engine.vocab_size)
    features = {
        slot: engine.forward(row_batch(tokens, slot=slot)).features for slot, tokens in ((0, first), (1, other))
    }
    for slot, tokens in ((0, first), (1, other)):
        engine.extend(row_batch(tokens[1:], slot=slot), features[slot][:, :-1])
    engine.forward(row_batch(random_tokens(30, 13, engine.vocab_size), slot=2))
    engine.copy_prefix(0, 2, shared)
    continued = engine.forward(row_batch(other[shared:], shared, slot=2))
    assert torch.equal(continued.features, features[1][:, shared:])
    drafted = engine.extend(row_batch(other[shared:], shared - 1, slot=2), features[1][:, shared - 1 : -1])
    fresh = engine.extend(row_batch(other[shared:], shared - 1, slot=1), features[1][:, shared - 1 : -1])
    assert torch.equal(drafted.logits, fresh.logits)
    with pytest.raises(PrismError, match="slot"):
        engine.copy_prefix(0, LIMITS.slots, shared)


class _Stepwise:
    """An engine's separate draft steps only, so that `grow_tree` runs its own loop."""

    def __init__(self, engine: CpuEngine) -> None:
        self._engine = engine
        self.device, self.draft_vocab, self.hidden_size = engine.device, engine.draft_vocab, engine.hidden_size

    def extend(self, batch: TokenBatch, features: torch.Tensor) -> DraftOutput:
        return self._engine.extend(batch, features)

    def step(self, k: int, batch: TokenBatch, hidden: torch.Tensor) -> DraftOutput:
        return self._engine.step(k, batch, hidden)


@pytest.mark.parametrize("tree", ["2/1/1", "6/1/5", "8/4/4", "16/4/6", "30/6/4"])
def test_fused_round_equals_the_generic_loop(engine: CpuEngine, tree: str) -> None:
    shape = TreeShape.parse(tree)
    counts = torch.tensor([5, 2])
    zero = torch.zeros(2, dtype=torch.int64)
    tokens = torch.tensor([random_tokens(5, row, engine.vocab_size) for row in range(2)])
    positions = torch.arange(5).repeat(2, 1)
    batch = TokenBatch(tokens, positions, torch.tensor([1, 0]), zero, counts)
    features = torch.randn(2, 5, engine.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = grow_tree(_Stepwise(engine), batch, features, shape)
    actual = engine.draft_round(batch, features, shape)
    for name in ("tokens", "parents", "depths", "mask"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tree", ["2/1/1", "6/1/5", "16/4/6", "16/4/6@0.3", "8/2/5@0.5"])
def test_fused_greedy_round_equals_its_parts(engine: CpuEngine, tree: str) -> None:
    """`speculate` in slots 0 and 1 against draft_round, forward, verify_greedy and commit in slots 2 and 3."""
    shape = TreeShape.parse(tree)
    counts = torch.tensor([6, 3])
    zero = torch.zeros(2, dtype=torch.int64)
    tokens = torch.tensor([random_tokens(7, row + 20, engine.vocab_size) for row in range(2)])
    positions = torch.arange(6).repeat(2, 1)
    after = torch.tensor([[1], [2]])
    results = []
    for first in (0, 2):
        slots = torch.arange(first, first + 2)
        features = engine.forward(TokenBatch(tokens[:, :6], positions, slots, zero, counts), "none").features
        newly = TokenBatch(tokens[:, 1:], positions, slots, zero, counts)
        if first == 0:
            output = engine.speculate(newly, features, shape)
            committed = [output.tokens[b, : output.counts[b]].tolist() for b in range(2)]
            sizes, kept = output.counts, [output.features[b, : output.counts[b]] for b in range(2)]
        else:
            grown = engine.draft_round(newly, features, shape)
            full = torch.full_like(counts, shape.size)
            verified = engine.forward(
                TokenBatch(grown.tokens, grown.depths + counts[:, None], slots, counts, full, grown.mask)
            )
            assert verified.greedy is not None
            likely = grown.log_probs >= math.log(shape.min_probability or 1e-30)
            if shape.min_probability:
                assert not likely.all(), grown.log_probs.exp()
            assert output.drafted.tolist() == (likely.sum(1) - 1).tolist()
            # What is cut must not be accepted: no draft equals the token -1.
            verdict = verify_greedy(replace(grown, tokens=grown.tokens.masked_fill(~likely, -1)), verified.greedy)
            engine.commit(slots, counts, verdict.path, verdict.counts)
            sizes = verdict.counts
            paths = [verdict.path[b, : sizes[b]] for b in range(2)]
            committed = [[*grown.tokens[b, paths[b]][1:].tolist(), int(verdict.bonus[b])] for b in range(2)]
            kept = [verified.features[b, paths[b]] for b in range(2)]
        following = engine.forward(TokenBatch(after, (counts + sizes)[:, None], slots, counts + sizes, zero + 1))
        assert following.logits is not None
        results.append((committed, kept, following.logits.clone()))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert torch.equal(results[0][2], results[1][2])


def test_limits_are_enforced(engine: CpuEngine) -> None:
    with pytest.raises(PrismError, match="context"):
        engine.forward(row_batch([1], LIMITS.context))
    with pytest.raises(PrismError, match="slot"):
        engine.forward(row_batch([1], slot=LIMITS.slots))
    with pytest.raises(PrismError, match="vocabulary"):
        engine.forward(row_batch([engine.vocab_size]))
    with pytest.raises(PrismError, match="limit"):
        engine.forward(row_batch([1] * (LIMITS.tokens_per_call + 1)))


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    target = tiny_target(seed=3)
    compiler = find_compiler()
    assert compiler is not None
    write_files(tmp_path, target, None, LIMITS.context, RUNNABLE[0], compiler)
    weights = tmp_path / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(PrismError, match="shorter"):
        open_files(tmp_path, target.config, None, LIMITS, threads=1)


def test_compiler_errors_are_one_sentence(tmp_path: Path) -> None:
    target = tiny_target(seed=3)
    broken = Isa("broken", frozenset(), ("-mno-such-flag",))
    with pytest.raises(PrismError, match="could not compile"):
        write_files(tmp_path, target, None, LIMITS.context, broken, find_compiler() or "g++")
