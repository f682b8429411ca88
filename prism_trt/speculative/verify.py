"""Lossless verification of draft trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prism_trt.engines.protocol import Tree
from prism_trt.speculative.sampling import draw, uniforms

NodeProbs = Callable[[list[int], list[int]], Tensor]
"""Maps rows and one node of each to the target's distributions after those nodes: [R, V] float32."""


class Verdict(NamedTuple):
    """What a target pass accepted of each row's tree."""

    path: Tensor
    """[B, A] int64 accepted nodes, root first; entries from counts[b] on are meaningless nodes."""
    counts: Tensor
    """[B] int64 accepted nodes, root included."""
    bonus: Tensor
    """[B] int64 the target's own token after the last accepted node."""


def verify_greedy(tree: Tree, greedy: Tensor) -> Verdict:
    """Accept the longest path from the root on which each token is the target's argmax after its parent.

    Args:
        tree: N nodes per row, siblings distinct.
        greedy: [B, N] int64, the target's argmax after each node.
    """
    wrong = tree.tokens != greedy.gather(1, tree.parents)
    wrong[:, 0] = False
    rejected = (tree.mask & wrong[:, None, :]).any(2)
    # Siblings are distinct, so what remains is one path; parents precede children, so it is in order.
    counts = rejected.shape[1] - rejected.sum(1)
    path = rejected.sort(dim=1, stable=True).indices[:, : int(counts.max())]
    last = path.gather(1, (counts - 1)[:, None])
    return Verdict(path, counts, greedy.gather(1, last)[:, 0])


def verify_sampling(tree: Tree, probs: NodeProbs, generators: Sequence[torch.Generator]) -> Verdict:
    """Accept a path such that the committed tokens are distributed as if the target had drawn them one by one.

    Speculative sampling (Leviathan et al. 2023, section 2.3) with a deterministic draft, q[x] = 1, applied to the
    children of a node in turn (SpecInfer, Miao et al. 2024, section 4.3; `evaluate_posterior` of EAGLE): with p the
    target's distribution after the node, accept child x with probability p[x]; on rejection set p[x] = 0, renormalise
    and try the next child. When all are rejected, draw the bonus token from what is left of p; at a leaf, from p.

    Args:
        tree: N nodes per row, siblings distinct. Siblings are tried in node order.
        probs: gives p for the visited nodes only; for a table ``p`` [B, N, V] pass ``lambda b, n: p[b, n]``.
        generators: one per row. A row consumes N numbers of its own and none of its neighbours'.
    """
    rows, nodes = tree.tokens.shape
    tokens = tree.tokens.tolist()
    children = [_children(parents) for parents in tree.parents.tolist()]
    chances = [uniforms(generator, nodes) for generator in generators]
    paths = [[0] for _ in range(rows)]
    bonus = [0] * rows
    walking = list(range(rows))
    while walking:
        p = probs(walking, [paths[b][-1] for b in walking])
        candidates = [children[b][paths[b][-1]] for b in walking]
        p_children = _lookup(p, [[tokens[b][x] for x in found] for b, found in zip(walking, candidates, strict=True)])
        stopped, rejected, moved = [], [], []
        for i, b in enumerate(walking):
            left = 1.0
            for x, p_x in zip(candidates[i], p_children[i], strict=True):
                if chances[b][x] * left < p_x:
                    paths[b].append(x)
                    moved.append(b)
                    break
                left -= p_x
            else:
                stopped.append(i)
                rejected.append([tokens[b][x] for x in candidates[i]])
        if stopped:
            residual = _residual(p[stopped], rejected)
            chance = torch.tensor([chances[walking[i]][0] for i in stopped], dtype=torch.float64)
            for i, token in zip(stopped, draw(residual, chance).tolist(), strict=True):
                bonus[walking[i]] = token
        walking = moved
    longest = max(map(len, paths))
    device = tree.tokens.device
    return Verdict(
        torch.tensor([path + [0] * (longest - len(path)) for path in paths], device=device),
        torch.tensor([len(path) for path in paths], device=device),
        torch.tensor(bonus, device=device),
    )


def _children(parents: list[int]) -> list[list[int]]:
    children: list[list[int]] = [[] for _ in parents]
    for node in range(1, len(parents)):
        children[parents[node]].append(node)
    return children


def _lookup(p: Tensor, tokens: list[list[int]]) -> list[list[float]]:
    """p [R, V] at the tokens of each row, in one device access."""
    rows = [i for i, found in enumerate(tokens) for _ in found]
    values = iter(p[rows, [token for found in tokens for token in found]].tolist() if rows else ())
    return [[next(values) for _ in found] for found in tokens]


def _residual(p: Tensor, rejected: list[list[int]]) -> Tensor:
    """p [R, V] without the rejected tokens; where rounding left nothing, p itself."""
    residual = p.clone()
    rows = [i for i, found in enumerate(rejected) for _ in found]
    if rows:
        residual[rows, [token for found in rejected for token in found]] = 0.0
    return torch.where(residual.sum(1, keepdim=True) > 0, residual, p)
