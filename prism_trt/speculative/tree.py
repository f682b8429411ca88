"""EAGLE-2 dynamic draft trees (Li et al. 2024, "EAGLE-2", section 4; `topK_genrate` in its code).

Every tie is broken by a rule, so that engines which grow the tree on their own can be checked against this loop:

1. Children of a node: the `width` draft-vocabulary entries of highest logit; equal logits, lower index first.
2. Log-probability of a child: ``logit - logsumexp(logits)`` in float32, added in float32 to its parent's.
3. Generation order: the root is 0, the children of step 0 are 1..W; each later step appends the W*W children of the
   nodes it expanded, in the order of (rank of the parent among the expanded nodes, rank of the child by rule 1).
4. Expanded at step k + 1: of the nodes drafted at step k, the `width` of highest cumulative log-probability; equal
   ones, lower generation index first. They are fed in that order.
5. Verified: of all nodes, the `size` of highest cumulative log-probability; equal ones, lower generation index first.
   A child is never above its parent and always generated after it, so this rule keeps every ancestor of a kept node
   even when a child has log-probability exactly 0.
6. Order of the tree: ascending generation index. A parent precedes its children, the nodes of a depth are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_trt.config import TreeShape
from prism_trt.engines.protocol import Engine, TokenBatch, Tree


def grow_tree(engine: Engine, batch: TokenBatch, features: Tensor, shape: TreeShape) -> Tree:
    """Extend the drafter over newly committed tokens and draft a tree below each row's last valid token.

    Args:
        batch: [B, T] newly committed tokens, as `Engine.extend` takes them.
        features: [B, T, F] target features at ``batch.positions``.
        shape: the tree to grow; its width must not exceed the draft vocabulary.

    Returns:
        A `Tree` with ``shape.size`` nodes per row, by the rules above.
    """
    draft_round = getattr(engine, "draft_round", None)
    if draft_round is not None:
        return draft_round(batch, features, shape)
    return grow_tree_stepwise(engine, batch, features, shape)


def grow_tree_stepwise(engine: Engine, batch: TokenBatch, features: Tensor, shape: TreeShape) -> Tree:
    """`grow_tree` by one `extend` and ``shape.depth - 1`` calls of `step`, whatever else the engine offers.

    A node of depth d follows a token of index r + d - 1, r being the root's index in the sequence, so its draft
    position is that of the root's entry plus d. Its input is its token and the hidden state that its parent gave.
    """
    rows, width = batch.tokens.shape[0], shape.width
    device = batch.tokens.device
    last = (batch.counts - 1)[:, None]
    root_position = batch.positions.gather(1, last)
    committed = batch.lengths + batch.counts
    counts = torch.full_like(batch.counts, width)
    self_only = torch.eye(width, dtype=torch.bool, device=device).expand(rows, width, width)

    output = engine.extend(batch, features)
    gains, words = best_children(output.logits, width)
    hidden = output.hidden.expand(rows, width, output.hidden.shape[2])
    scores, tokens = gains.flatten(1), _to_target(words.flatten(1), engine.draft_vocab)
    numbers = torch.arange(1, width + 1, device=device).expand(rows, width)
    mask = self_only

    root_number = torch.zeros_like(last)
    all_tokens = [batch.tokens.gather(1, last), tokens]
    all_scores = [torch.zeros_like(scores[:, :1]), scores]
    all_parents = [root_number, root_number.expand(rows, width)]
    generated = 1 + width
    for k in range(1, shape.depth):
        level = TokenBatch(
            tokens=tokens,
            positions=(root_position + k).expand(rows, width),
            slots=batch.slots,
            lengths=committed,
            counts=counts,
            mask=mask,
            offset=(k - 1) * width,
        )
        output = engine.step(k, level, hidden)
        gains, words = best_children(output.logits, width)
        new_scores = (scores[:, :, None] + gains).flatten(1)
        new_tokens = _to_target(words.flatten(1), engine.draft_vocab)
        all_tokens.append(new_tokens)
        all_scores.append(new_scores)
        all_parents.append(numbers.repeat_interleave(width, 1))
        if k + 1 < shape.depth:
            ranked, order = new_scores.sort(dim=1, descending=True, stable=True)
            scores, chosen = ranked[:, :width], order[:, :width]
            parent = chosen // width
            tokens, numbers = new_tokens.gather(1, chosen), chosen + generated
            hidden = _take(output.hidden, parent)
            mask = torch.cat((_take(mask, parent), self_only), 2)
        generated += width * width
    return _select(torch.cat(all_tokens, 1), torch.cat(all_parents, 1), torch.cat(all_scores, 1), shape)


def best_children(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rule 1 and 2: the `width` best entries of the last dimension.

    Args:
        logits: [..., D] float32, D >= `width`.

    Returns:
        [..., width] float32 log-probabilities, best first, and [..., width] int64 indices.
    """
    # One more than needed: a tie across the cut is then visible as well.
    values, indices = logits.topk(min(width + 1, logits.shape[-1]))
    tied = values[..., 1:] == values[..., :-1]
    values, indices = values[..., :width], indices[..., :width]
    if tied.any():
        rows = tied.any(-1)
        indices = indices.clone()
        indices[rows] = _unique_keys(logits[rows]).topk(width).indices
    return values - logits.logsumexp(-1, keepdim=True), indices


def ancestor_mask(parents: Tensor, depth: int) -> Tensor:
    """[B, N, N] bool, true where node i descends from (or is) node j, for trees no deeper than `depth`.

    Args:
        parents: [B, N] int64, the root's parent being itself.
    """
    rows, nodes = parents.shape
    mask = torch.eye(nodes, dtype=torch.bool, device=parents.device).expand(rows, nodes, nodes)
    jump, covered = parents, 1
    while covered <= depth:
        mask = mask | _take(mask, jump)
        jump = jump.gather(1, jump)
        covered *= 2
    return mask


def _select(tokens: Tensor, parents: Tensor, scores: Tensor, shape: TreeShape) -> Tree:
    """Rules 5 and 6 over all generated nodes, [B, G] each in generation order; `parents` are generation indices."""
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, : shape.size].sort(1).values
    square = shape.width**2
    depths = (kept + (square - shape.width - 1)) // square + 1
    depths[:, 0] = 0
    kept_parents = torch.searchsorted(kept, parents.gather(1, kept))
    return Tree(
        tokens=tokens.gather(1, kept),
        parents=kept_parents,
        depths=depths,
        mask=ancestor_mask(kept_parents, shape.depth),
        log_probs=scores.gather(1, kept),
    )


def _take(values: Tensor, index: Tensor) -> Tensor:
    """[B, N, X] rows of `values` [B, M, X] at `index` [B, N]."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


def _to_target(words: Tensor, draft_vocab: Tensor | None) -> Tensor:
    return words if draft_vocab is None else draft_vocab[words]


def _unique_keys(logits: Tensor) -> Tensor:
    """int64 keys ordered as (logit, -index): no two are equal, so `topk` has only one answer."""
    bits = (logits + 0.0).view(torch.int32)  # the addition turns -0.0 into 0.0, which compares equal to it
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | torch.arange(logits.shape[-1] - 1, -1, -1, device=logits.device)
