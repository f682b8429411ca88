from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prism_trt.config import TreeShape
from prism_trt.engines.protocol import DraftOutput, EngineLimits, TokenBatch, Tree
from prism_trt.speculative.tree import ancestor_mask, best_children, grow_tree, grow_tree_stepwise
from tests.speculative.bag_engine import BagEngine, FusedBagEngine


@st.composite
def shapes(draw: st.DrawFn, max_depth: int = 5, max_width: int = 5) -> TreeShape:
    depth, width = draw(st.integers(1, max_depth)), draw(st.integers(1, max_width))
    return TreeShape(depth=depth, width=width, size=draw(st.integers(2, min(40, 1 + width + (depth - 1) * width**2))))


class ScriptedDrafter:
    """Draft logits by table: the children of a token depend on the step and the token only. Logs what it was fed."""

    draft_vocab: Tensor | None = None
    device = torch.device("cpu")
    limits = EngineLimits(8, 10_000, 10_000)

    def __init__(self, table: Tensor) -> None:
        self.table = table  # [K, V, V]
        self.levels: list[tuple[TokenBatch, Tensor]] = []

    def extend(self, batch: TokenBatch, features: Tensor) -> DraftOutput:
        last = batch.tokens.gather(1, (batch.counts - 1)[:, None])
        return self._output(0, last, torch.zeros(*last.shape, 1))

    def step(self, k: int, batch: TokenBatch, hidden: Tensor) -> DraftOutput:
        self.levels.append((batch, hidden))
        return self._output(k, batch.tokens, hidden)

    def _output(self, k: int, tokens: Tensor, hidden: Tensor) -> DraftOutput:
        # The hidden state spells the path: that of the parent times 1000, plus the token.
        return DraftOutput(self.table[k][tokens], hidden.double() * 1000 + tokens[:, :, None] + 1)


def scripted_batch(roots: list[int], length: int = 3) -> tuple[TokenBatch, Tensor]:
    rows = len(roots)
    tokens = torch.tensor([[0, root] for root in roots])
    lengths = torch.full((rows,), length)
    positions = lengths[:, None] + torch.arange(2)
    return TokenBatch(tokens, positions, torch.arange(rows), lengths, torch.full((rows,), 2)), torch.zeros(rows, 2, 1)


def reference_tree(table: Tensor, root: int, shape: TreeShape) -> list[tuple[int, int, int, float]]:
    """The rules of the module's docstring in plain Python: (token, parent node, depth, score) of each kept node."""
    nodes = [(root, 0, 0, torch.tensor(0.0))]
    level = [0]
    for k in range(shape.depth):
        new = []
        for parent in level:
            logits = table[k][nodes[parent][0]]
            norm = logits.logsumexp(-1)
            for token in sorted(range(len(logits)), key=lambda x: (-logits[x].item(), x))[: shape.width]:
                new.append(len(nodes))
                nodes.append((token, parent, k + 1, nodes[parent][3] + (logits[token] - norm)))
        level = sorted(new, key=lambda n: (-nodes[n][3].item(), n))[: shape.width]
    ranked = sorted(range(len(nodes)), key=lambda n: (-nodes[n][3].item(), n))[: shape.size]
    kept = sorted(ranked)
    return [(nodes[n][0], kept.index(nodes[n][1]), nodes[n][2], nodes[n][3].item()) for n in kept]


def check_invariants(tree: Tree, shape: TreeShape) -> None:
    rows, size = tree.tokens.shape
    assert size == shape.size
    for b in range(rows):
        parents, depths, tokens = tree.parents[b].tolist(), tree.depths[b].tolist(), tree.tokens[b].tolist()
        assert parents[0] == 0 and depths[0] == 0 and tree.log_probs[b, 0] == 0
        assert depths == sorted(depths) and max(depths) <= shape.depth
        ancestors = [{0}]
        for node in range(1, size):
            assert parents[node] < node
            assert depths[node] == depths[parents[node]] + 1
            assert tree.log_probs[b, node] <= tree.log_probs[b, parents[node]]
            ancestors.append(ancestors[parents[node]] | {node})
        assert tree.mask[b].tolist() == [[j in ancestors[i] for j in range(size)] for i in range(size)]
        siblings = [(parents[node], tokens[node]) for node in range(1, size)]
        assert len(set(siblings)) == len(siblings)
        per_parent = [parents[1:].count(parent) for parent in set(parents[1:])]
        assert max(per_parent) <= shape.width


@given(shape=shapes(), seed=st.integers(0, 10**6), levels=st.sampled_from([0, 2, 3]))
@settings(max_examples=80, deadline=None)
def test_tree_equals_the_documented_rules(shape: TreeShape, seed: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vocab = 7
    table = torch.randn(shape.depth, vocab, vocab, generator=generator)
    if levels:  # few distinct values: many ties inside a node, between nodes, and between a child and its parent
        table = torch.randint(0, levels, table.shape, generator=generator).float() * 60
    roots = [1, 4]
    engine = ScriptedDrafter(table)
    tree = grow_tree(engine, *scripted_batch(roots), shape)  # type: ignore[arg-type]
    check_invariants(tree, shape)
    for b, root in enumerate(roots):
        expected = reference_tree(table, root, shape)
        assert tree.tokens[b].tolist() == [node[0] for node in expected]
        assert tree.parents[b].tolist() == [node[1] for node in expected]
        assert tree.depths[b].tolist() == [node[2] for node in expected]
        assert tree.log_probs[b].tolist() == [node[3] for node in expected]


@given(shape=shapes(max_depth=4, max_width=4), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_steps_are_fed_ancestors_positions_and_parent_hidden(shape: TreeShape, seed: int) -> None:
    table = torch.randn(shape.depth, 9, 9, generator=torch.Generator().manual_seed(seed))
    engine = ScriptedDrafter(table)
    batch, features = scripted_batch([2, 5], length=11)
    grow_tree(engine, batch, features, shape)  # type: ignore[arg-type]
    assert len(engine.levels) == shape.depth - 1
    fed: list[list[list[int]]] = [[], []]  # per row: path (tokens + 1, from the root) of each in-flight entry
    for k, (level, hidden) in enumerate(engine.levels, start=1):
        assert level.offset == (k - 1) * shape.width
        assert level.lengths.tolist() == [13, 13]
        assert level.positions.tolist() == [[12 + k] * shape.width] * 2  # the root's draft entry is at 12
        assert level.counts.tolist() == [shape.width] * 2
        assert level.mask is not None
        for b in range(2):
            for i in range(shape.width):
                path = _digits(int(hidden[b, i, 0]))
                fed[b].append([*path, int(level.tokens[b, i]) + 1])
            for i in range(shape.width):
                mine = fed[b][level.offset + i]
                seen = [fed[b][j] for j in range(level.offset + shape.width) if level.mask[b, i, j]]
                assert seen == [mine[:length] for length in range(2, k + 2)]
                assert len(mine) == k + 1


def _digits(value: int) -> list[int]:
    digits: list[int] = []
    while value:
        digits.insert(0, value % 1000)
        value //= 1000
    return digits


def test_children_of_probability_one_keep_their_ancestors() -> None:
    # Every node has one child with log-probability exactly 0 and others of about -200.
    table = torch.full((6, 5, 5), -200.0)
    table[:, torch.arange(5), (torch.arange(5) + 1) % 5] = 200.0
    shape = TreeShape(depth=6, width=3, size=5)
    tree = grow_tree(ScriptedDrafter(table), *scripted_batch([0]), shape)  # type: ignore[arg-type]
    assert tree.log_probs.tolist() == [[0.0] * 5]
    assert tree.tokens.tolist() == [[0, 1, 2, 3, 4]]
    assert tree.parents.tolist() == [[0, 0, 1, 2, 3]]


def test_width_one_is_a_chain() -> None:
    table = torch.randn(5, 6, 6, generator=torch.Generator().manual_seed(3))
    tree = grow_tree(ScriptedDrafter(table), *scripted_batch([2]), TreeShape(depth=5, width=1, size=6))  # type: ignore[arg-type]
    assert tree.parents.tolist() == [[0, 0, 1, 2, 3, 4]]
    assert tree.depths.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert torch.equal(tree.mask[0], torch.ones(6, 6, dtype=torch.bool).tril())
    token, expected = 2, [2]
    for k in range(5):
        token = int(table[k, token].argmax())
        expected.append(token)
    assert tree.tokens.tolist() == [expected]


@given(
    values=st.lists(st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 2.0, 2.0000002]), min_size=1, max_size=12),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_best_children_break_ties_by_index(values: list[float], data: st.DataObject) -> None:
    width = data.draw(st.integers(1, len(values)))
    logits = torch.tensor(values)
    if logits.max() == -math.inf:
        logits[0] = 1.0
    gains, indices = best_children(torch.stack([logits, logits.flip(0)])[None], width)
    for row, source in zip(indices[0].tolist(), (logits, logits.flip(0)), strict=True):
        assert row == sorted(range(len(source)), key=lambda x: (-source[x].item(), x))[:width]
    torch.testing.assert_close(gains[0, 0], logits.log_softmax(0)[indices[0, 0]])
    assert (gains <= 0).all()


@given(seed=st.integers(0, 10**6), nodes=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_ancestor_mask_of_any_tree(seed: int, nodes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parents = [0] + [int(torch.randint(0, node, (), generator=generator)) for node in range(1, nodes)]
    ancestors = [{0}]
    for node in range(1, nodes):
        ancestors.append(ancestors[parents[node]] | {node})
    depth = max(map(len, ancestors)) - 1
    mask = ancestor_mask(torch.tensor([parents]), depth)[0]
    assert mask.tolist() == [[j in ancestors[i] for j in range(nodes)] for i in range(nodes)]


@given(shape=shapes(), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_rows_of_a_batch_do_not_meet(shape: TreeShape, seed: int) -> None:
    def grow(rows: list[int]) -> Tree:
        engine = BagEngine(seed, draft_vocab=list(range(3, 40, 2)), tokens_per_call=10_000)
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(0, 40, (4, 9), generator=generator)
        features = torch.randn(4, 9, engine.feature_size, generator=generator)
        counts = torch.tensor([9, 2, 5, 1])
        zeros = torch.zeros(len(rows), dtype=torch.int64)
        positions = torch.arange(9).expand(len(rows), 9)
        batch = TokenBatch(prompts[rows], positions, torch.tensor(rows), zeros, counts[rows])
        return grow_tree(engine, batch, features[rows], shape)

    together = grow([0, 1, 2, 3])
    check_invariants(together, shape)
    assert not together.log_probs.isnan().any()
    assert (together.tokens[:, 1:] % 2 == 1).all()  # ids of the draft vocabulary
    for row in range(4):
        alone = grow([row])
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert torch.equal(alone.parents[0], together.parents[row])


def test_a_fused_engine_drafts_in_one_call() -> None:
    shape = TreeShape(depth=4, width=3, size=9)
    fused, plain = FusedBagEngine(5), BagEngine(5)
    tokens = torch.tensor([[3, 1, 4]])
    zeros = torch.zeros(1, dtype=torch.int64)
    batch = TokenBatch(tokens, torch.arange(3)[None], zeros, zeros, torch.tensor([3]))
    features = torch.randn(1, 3, fused.feature_size, generator=torch.Generator().manual_seed(0))
    tree = grow_tree(fused, batch, features, shape)
    assert fused.calls[0] == ("draft_round", 3)
    assert torch.equal(tree.tokens, grow_tree_stepwise(plain, batch, features, shape).tokens)
