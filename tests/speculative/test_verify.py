from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prism_trt.engines.protocol import Tree
from prism_trt.speculative.sampling import SamplingParams, draw, uniforms, warp
from prism_trt.speculative.tree import ancestor_mask
from prism_trt.speculative.verify import Verdict, verify_greedy, verify_sampling
from tests.speculative.distributions import p_value


def lookup(probs: Tensor, rows: list[int], nodes: list[int]) -> Tensor:
    return probs[rows, nodes]


def make_tree(tokens: list[list[int]], parents: list[list[int]]) -> Tree:
    parent = torch.tensor(parents)
    mask = ancestor_mask(parent, parent.shape[1])
    return Tree(torch.tensor(tokens), parent, mask.sum(2) - 1, mask, torch.zeros(parent.shape))


@st.composite
def trees(draw: st.DrawFn, vocab: int = 4, rows: int = 3) -> Tree:
    nodes = draw(st.integers(2, 14))
    all_tokens, all_parents = [], []
    for _ in range(rows):
        tokens, parents, taken = [draw(st.integers(0, vocab - 1))], [0], {0: set[int]()}
        for node in range(1, nodes):
            open_nodes = [n for n in range(max(parents[-1], 0), node) if len(taken[n]) < vocab]
            parent = draw(st.sampled_from(open_nodes))
            token = draw(st.sampled_from(sorted(set(range(vocab)) - taken[parent])))
            taken[parent].add(token)
            taken[node] = set()
            tokens.append(token)
            parents.append(parent)
        all_tokens.append(tokens)
        all_parents.append(parents)
    return make_tree(all_tokens, all_parents)


def walk(tree: Tree, greedy: Tensor, row: int) -> tuple[list[int], int]:
    """Plain reference: follow the child whose token is the target's choice."""
    path = [0]
    while True:
        choice = int(greedy[row, path[-1]])
        following = [
            n
            for n in range(1, tree.tokens.shape[1])
            if tree.parents[row, n] == path[-1] and tree.tokens[row, n] == choice
        ]
        if not following:
            return path, choice
        path += following


@given(tree=trees(), seed=st.integers(0, 10**6), helpful=st.booleans())
@settings(max_examples=150, deadline=None)
def test_greedy_equals_the_reference(tree: Tree, seed: int, helpful: bool) -> None:
    greedy = torch.randint(0, 4, tree.tokens.shape, generator=torch.Generator().manual_seed(seed))
    if helpful:  # make the choice after each node its last child's token, so that paths get long
        for node in range(1, tree.tokens.shape[1]):
            greedy.scatter_(1, tree.parents[:, node : node + 1], tree.tokens[:, node : node + 1])
    verdict = verify_greedy(tree, greedy)
    for row in range(tree.tokens.shape[0]):
        path, bonus = walk(tree, greedy, row)
        assert verdict.path[row, : verdict.counts[row]].tolist() == path
        assert verdict.bonus[row] == bonus
    assert verdict.path.shape[1] == verdict.counts.max()


@given(tree=trees(), seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_sampling_at_temperature_zero_is_greedy(tree: Tree, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*tree.tokens.shape, 4, generator=generator)
    probs = warp(logits, SamplingParams())
    sampled = verify_sampling(tree, partial(lookup, probs), [generator] * 3)
    greedy = verify_greedy(tree, logits.argmax(-1))
    assert torch.equal(sampled.counts, greedy.counts)
    assert torch.equal(sampled.bonus, greedy.bonus)
    for row, count in enumerate(greedy.counts.tolist()):
        assert torch.equal(sampled.path[row, :count], greedy.path[row, :count])


@given(tree=trees(), seed=st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_a_rows_draws_are_its_own(tree: Tree, seed: int) -> None:
    probs = torch.randn(*tree.tokens.shape, 4, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    together = verify_sampling(
        tree, partial(lookup, probs), [torch.Generator().manual_seed(seed + row) for row in range(3)]
    )
    for row in range(3):
        one = Tree(
            *(values[row : row + 1] for values in (tree.tokens, tree.parents, tree.depths, tree.mask, tree.log_probs))
        )
        table = probs[row : row + 1]
        alone = verify_sampling(one, partial(lookup, table), [torch.Generator().manual_seed(seed + row)])
        count = int(alone.counts[0])
        assert count == together.counts[row]
        assert torch.equal(alone.path[0, :count], together.path[row, :count])
        assert alone.bonus[0] == together.bonus[row]


# Losslessness: the joint distribution of three tokens over a vocabulary of four must be the target's, whatever the
# tree. The target is a table of distributions after 0, 1 and 2 tokens.

VOCAB, DRAWS = 4, 20_000
Verifier = Callable[[Tree, Callable[[list[int], list[int]], Tensor], list[torch.Generator]], Verdict]

TREES = {
    "chain": ([0, 1, 2], [0, 0, 1]),
    "wide": ([0, 3, 0, 2], [0, 0, 0, 0]),
    "all children": ([0, 2, 1, 0, 3], [0, 0, 0, 0, 0]),
    "two levels": ([0, 1, 0, 3, 2, 1, 0, 3], [0, 0, 0, 1, 1, 2, 2, 2]),
    "three levels": ([0, 1, 2, 0, 3, 2, 1, 0], [0, 0, 0, 1, 1, 3, 3, 5]),
}


def conditionals(params: SamplingParams, seed: int = 0) -> list[Tensor]:
    """[V]*d + [V] tables: the target's distribution after each prefix of d tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [warp(torch.randn(*[VOCAB] * (d + 1), generator=generator), params) for d in range(3)]


def sample_three(
    tables: list[Tensor], tokens: list[int], parents: list[int], verifier: Verifier, draws: int, seed: int = 1
) -> Tensor:
    """[draws, 3] tokens generated in rounds with the same tree, restarted below what was committed."""
    generator = torch.Generator().manual_seed(seed)
    # One row per prefix of 0, 1 or 2 tokens, and a last one for longer prefixes, whose tokens are cut.
    table = torch.cat([*(t.reshape(-1, VOCAB) for t in tables), torch.full((1, VOCAB), 1 / VOCAB)])
    first_row = torch.tensor([0, 1, 1 + VOCAB, len(table) - 1])
    one = make_tree([tokens], [parents])
    depths, codes = one.depths[0], [0] * len(tokens)
    for node in range(1, len(tokens)):
        codes[node] = codes[parents[node]] * VOCAB + tokens[node]

    done = [[] for _ in range(draws)]  # type: list[list[int]]
    while open_rows := [row for row in range(draws) if len(done[row]) < 3]:
        have = torch.tensor([len(done[row]) for row in open_rows])[:, None]
        prefix = torch.tensor([sum(t * VOCAB**i for i, t in enumerate(reversed(done[row]))) for row in open_rows])
        code = prefix[:, None] * VOCAB**depths + torch.tensor(codes)
        length = have + depths
        context = torch.where(length < 3, first_row[length.clamp(max=3)] + code, len(table) - 1)
        fields = (one.tokens, one.parents, one.depths, one.mask, one.log_probs)
        tree = Tree(*(values.expand(len(open_rows), *values.shape[1:]) for values in fields))
        verdict = verifier(tree, partial(lookup, table[context]), [generator] * len(open_rows))
        for i, (path, count, bonus) in enumerate(zip(*(field.tolist() for field in verdict), strict=True)):
            done[open_rows[i]] += [*(tokens[node] for node in path[1:count]), bonus]
    return torch.tensor([row[:3] for row in done])


@pytest.mark.parametrize(
    ("name", "params"),
    [(name, SamplingParams(temperature=temperature)) for name in TREES for temperature in (0.6, 1.0)]
    + [("two levels", SamplingParams(temperature=1.5, top_k=3)), ("wide", SamplingParams(temperature=1, top_p=0.8))],
    ids=str,
)
def test_sampling_is_lossless(name: str, params: SamplingParams) -> None:
    tables = conditionals(params)
    samples = sample_three(tables, *TREES[name], verify_sampling, DRAWS)
    assert p_value(samples, tables) > 1e-3


def accept_more(
    tree: Tree, probs: Callable[[list[int], list[int]], Tensor], generators: list[torch.Generator]
) -> Verdict:
    """Wrong on purpose: accepts a child with probability p[x] / max(p)."""
    return _wrong(tree, probs, generators, relative_to_best=True, renormalise=True)


def no_renormalisation(
    tree: Tree, probs: Callable[[list[int], list[int]], Tensor], generators: list[torch.Generator]
) -> Verdict:
    """Wrong on purpose: later siblings are accepted with p[x] that was not renormalised."""
    return _wrong(tree, probs, generators, relative_to_best=False, renormalise=False)


def _wrong(
    tree: Tree,
    probs: Callable[[list[int], list[int]], Tensor],
    generators: list[torch.Generator],
    relative_to_best: bool,
    renormalise: bool,
) -> Verdict:
    paths, bonus = [], []
    for row, generator in enumerate(generators):
        path = [0]
        moved = True
        while moved:
            moved = False
            p = probs([row], [path[-1]])[0].clone()
            for child in (tree.parents[row, 1:] == path[-1]).nonzero()[:, 0].tolist():
                token = tree.tokens[row, child + 1]
                chance = p[token] / p.max() if relative_to_best else p[token]
                if uniforms(generator, 1)[0] < chance:
                    path.append(child + 1)
                    moved = True
                    break
                p[token] = 0
                if renormalise and p.sum() > 0:
                    p = p / p.sum()
        if p.sum() == 0:
            p = torch.ones(VOCAB)
        bonus.append(int(draw(p[None], torch.tensor(uniforms(generator, 1), dtype=torch.float64))[0]))
        paths.append(path)
    longest = max(map(len, paths))
    return Verdict(
        torch.tensor([path + [0] * (longest - len(path)) for path in paths]),
        torch.tensor([len(path) for path in paths]),
        torch.tensor(bonus),
    )


@pytest.mark.parametrize("wrong", [accept_more, no_renormalisation])
def test_the_chi_square_test_sees_a_wrong_rule(wrong: Verifier) -> None:
    tables = conditionals(SamplingParams(temperature=1.0))
    samples = sample_three(tables, *TREES["two levels"], wrong, 4_000)
    assert p_value(samples, tables) < 1e-9


def test_children_that_hold_all_the_mass_never_leave_an_empty_residual() -> None:
    # Probabilities that sum to a little less than 1 in floating point, all of them drafted.
    tree = make_tree([[0, 0, 1, 2]], [[0, 0, 0, 0]])
    probs = torch.tensor([0.1, 0.2, 0.69, 0.0])
    drawn = [
        verify_sampling(tree, lambda b, n: probs.expand(len(b), -1), [torch.Generator().manual_seed(seed)])
        for seed in range(300)
    ]
    last = [int(v.bonus[0]) if v.counts[0] == 1 else int(v.path[0, 1]) - 1 for v in drawn]
    assert set(last) == {0, 1, 2}
