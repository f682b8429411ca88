"""EAGLE-2 tree growth as part of a network: the rules of `prism_trt.speculative.tree`, in the same order.

`ITopKLayer` documents no order of equal entries. Rules 4 and 5 decide between few nodes and are therefore computed by
comparing all pairs, which fixes every tie and keeps the ancestors of every selected node. Rule 1 decides between all
words and is left to the runtime's own order of equal logits (the walker's is the rule's).

Shape legend: B rows, W width, D draft vocabulary, G generated nodes, N selected nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prism_trt.config import TreeShape
from prism_trt.convert.graph import Graph, Value
from prism_trt.engines.tensorrt.names import MASKED


class TreeValues(NamedTuple):
    """A `Tree` as values of a network: [B, N] int32 (mask [B, N, N] bool, log_probs [B, N] float32)."""

    tokens: Value
    parents: Value
    depths: Value
    mask: Value
    log_probs: Value


class TreeGrowth:
    """Grows trees of one shape: `plant` after step 0; `grow` after each later one, and `choose` before the next; then
    `select`."""

    def __init__(self, graph: Graph, shape: TreeShape, rows: Value, root: Value, draft_vocab: Tensor | None) -> None:
        """Begin at the root tokens `root` [B, 1] int32; `rows` is B as int64 [1]."""
        self._graph = graph
        self._shape = shape
        self._rows = rows
        self._words = None if draft_vocab is None else graph.weight("draft_vocab", draft_vocab, torch.int32)
        self._root = root
        self._tokens: list[Value] = []
        self._scores: list[Value] = []
        self._parents: list[Value] = []
        self._generated = 0

    def plant(self, logits: Value) -> Value:
        """Children of the root from `logits` [B, 1, D] float32: their tokens [B, W]."""
        graph, width = self._graph, self._shape.width
        gains, words = self._children(logits)
        tokens = self._to_target(graph.reshape(words, (0, width), name="words"))
        self._level_scores = graph.reshape(gains, (0, width), name="scores")
        zero = graph.subtract(self._root, self._root, "zero")  # [B, 1]
        self._numbers = graph.add(zero, self._range(1, width), "numbers")
        self._collect(self._root, graph.cast(zero, torch.float32), zero)
        self._collect(tokens, self._level_scores, graph.expand(zero, (self._rows, width), "parents"))
        eye = torch.full((1, width, width), MASKED).masked_fill_(torch.eye(width, dtype=torch.bool), 0.0)
        self._self_only = graph.expand(graph.weight("self_only", eye), (self._rows, width, width), "self_only")
        self._mask = self._self_only
        return tokens

    def mask(self) -> Value:
        """[B, 1, W, k * W]: which drafted entries the W nodes of the next step k may read, as an additive mask."""
        return self._graph.reshape(self._mask, (0, 1, self._shape.width, -1), name="tree_mask")

    def grow(self, logits: Value) -> None:
        """Children of the level just run, from its `logits` [B, W, D] float32."""
        graph, width = self._graph, self._shape.width
        gains, words = self._children(logits)
        above = graph.reshape(self._level_scores, (0, width, 1), name="parent_scores")
        scores = graph.reshape(graph.add(above, gains, "accumulate"), (0, width * width), name="scores")
        tokens = self._to_target(graph.reshape(words, (0, width * width), name="words"))
        parents = graph.reshape(self._numbers, (0, width, 1), name="parent_numbers")
        parents = graph.expand(parents, (self._rows, width, width), "parents")
        self._collect(tokens, scores, graph.reshape(parents, (0, width * width), name="parents"))

    def choose(self) -> tuple[Value, Value]:
        """Of the children just grown, those that the next step runs.

        Returns:
            Their tokens [B, W] int32, and [B, W] int32: the place of their parents in the level just run.
        """
        graph, width = self._graph, self._shape.width
        tokens, scores, first = self._tokens[-1], self._scores[-1], self._generated - width * width
        chosen = self._best(scores, width * width, width)
        parent = graph.elementwise("FLOOR_DIV", chosen, graph.number(width, chosen), "parent")
        self._level_scores = graph.gather(scores, chosen, axis=1, batch_axes=1, name="chosen_scores")
        self._numbers = graph.add(chosen, graph.number(first, chosen), "numbers")
        inherited = graph.gather(self._mask, parent, axis=1, batch_axes=1, name="inherited_mask")
        self._mask = graph.concat((inherited, self._self_only), 2, "mask")
        return graph.gather(tokens, chosen, axis=1, batch_axes=1, name="tokens"), parent

    def select(self) -> TreeValues:
        """Rules 5 and 6."""
        graph, size, total = self._graph, self._shape.size, self._generated
        scores = graph.concat(self._scores, 1, "scores")
        kept = self._kept(scores, total, size)
        every_parent = graph.concat(self._parents, 1, "parents")
        parents = self._renumbered(graph.gather(every_parent, kept, axis=1, batch_axes=1, name="parent_numbers"), kept)
        square = self._shape.width**2
        number = torch.arange(total)
        depth = ((number + square - self._shape.width - 1) // square + 1).where(number > 0, 0)
        return TreeValues(
            tokens=graph.gather(graph.concat(self._tokens, 1, "tokens"), kept, axis=1, batch_axes=1, name="tokens"),
            parents=parents,
            depths=graph.gather(graph.weight("depths", depth, torch.int32), kept, axis=0, name="depths"),
            mask=self._ancestors(parents),
            log_probs=graph.gather(scores, kept, axis=1, batch_axes=1, name="log_probs"),
        )

    def _collect(self, tokens: Value, scores: Value, parents: Value) -> None:
        self._tokens.append(tokens)
        self._scores.append(scores)
        self._parents.append(parents)
        self._generated += tokens.shape[1]

    def _children(self, logits: Value) -> tuple[Value, Value]:
        """Rules 1 and 2: log-probabilities [B, n, W], best first, and draft words [B, n, W] int32 of [B, n, D]."""
        graph = self._graph
        best, words = graph.top(logits, self._shape.width, "children")
        greatest = graph.part(best, 2, 0, 1, "greatest")
        exponentials = graph.unary("EXP", graph.subtract(logits, greatest, "shift"), "exp")
        total = graph.unary("LOG", graph.reduce("SUM", exponentials, 2, "sum"), "log")
        return graph.subtract(best, graph.add(greatest, total, "logsumexp"), "log_probs"), words

    def _to_target(self, words: Value) -> Value:
        return words if self._words is None else self._graph.gather(self._words, words, axis=0, name="to_target")

    def _rank(self, scores: Value, count: int) -> Value:
        """[B, count] float32: how many of `scores` [B, count] come before each; equal ones in order of their index."""
        graph = self._graph
        own = graph.reshape(scores, (0, count, 1), name="own")
        other = graph.reshape(scores, (0, 1, count), name="other")
        greater = graph.elementwise("GREATER", other, own, "greater")
        earlier = torch.ones(1, count, count, dtype=torch.bool).tril(-1)
        first = graph.weight(f"earlier.{count}", earlier, torch.bool)
        tied = graph.elementwise("AND", graph.elementwise("EQUAL", other, own, "equal"), first, "tied")
        return self._count(graph.elementwise("OR", greater, tied, "before"))

    def _best(self, scores: Value, total: int, count: int) -> Value:
        """Rule 4: [B, count] int32 indices of the best of [B, total], best first."""
        ranks = self._rank(scores, total)
        return self._graph.top(self._graph.unary("NEG", ranks, "by_rank"), count, "chosen")[1]

    def _kept(self, scores: Value, total: int, size: int) -> Value:
        """Rules 5 and 6: [B, size] int32 generation indices of the best nodes, ascending."""
        graph = self._graph
        ranks = self._rank(scores, total)
        keep = graph.elementwise("LESS", ranks, graph.number(size, ranks), "keep")
        # Kept nodes in front of the others, and in each group the earlier in front of the later.
        order = graph.subtract(
            graph.multiply(graph.cast(keep, torch.float32), graph.number(total, ranks), "kept_first"),
            graph.cast(self._range(0, total), torch.float32),
            "order",
        )
        return graph.top(order, size, "kept")[1]

    def _renumbered(self, numbers: Value, kept: Value) -> Value:
        """[B, N] int32: the place in `kept` of each generation index `numbers` [B, N]."""
        graph, size = self._graph, self._shape.size
        own = graph.reshape(numbers, (0, size, 1), name="own")
        other = graph.reshape(kept, (0, 1, size), name="other")
        return graph.cast(self._count(graph.elementwise("LESS", other, own, "before")), torch.int32)

    def _count(self, flags: Value) -> Value:
        """[B, n] float32: true entries in each row of [B, n, m]."""
        graph = self._graph
        counts = graph.reduce("SUM", graph.cast(flags, torch.float32), 2, "count")
        return graph.reshape(counts, (0, flags.shape[1]), name="counts")

    def _ancestors(self, parents: Value) -> Value:
        """[B, N, N] bool as `prism_trt.speculative.tree.ancestor_mask`."""
        graph, size = self._graph, self._shape.size
        eye = graph.weight("eye", torch.eye(size)[None], torch.float32)
        mask = graph.expand(eye, (self._rows, size, size), "ancestors")
        jump, covered = parents, 1
        while covered <= self._shape.depth:
            above = graph.gather(mask, jump, axis=1, batch_axes=1, name="above")
            mask = graph.elementwise("MAX", mask, above, "ancestors")
            jump = graph.gather(jump, jump, axis=1, batch_axes=1, name="jump")
            covered *= 2
        return graph.cast(mask, torch.bool)

    def _range(self, first: int, count: int) -> Value:
        """[1, count] int32: first, first + 1, ..."""
        numbers = torch.arange(first, first + count)[None]
        return self._graph.weight(f"range.{first}.{count}", numbers, torch.int32)
