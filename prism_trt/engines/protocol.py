"""The contract between engines and `prism_trt.speculative`.

Shape legend: B rows (one request each), T tokens per row in this call (padded), V target vocabulary, D draft
vocabulary, F feature width, H hidden width, N tree nodes. Tensors live on `Engine.device`.

K/V rules: a request owns a slot of the K/V pool in the target and in the drafter. A call writes the K/V of row b,
token i at pool index ``lengths[b] + offset + i``; queries read every index below ``lengths[b]`` and, of the indices
from ``lengths[b]`` on, those that the mask admits (causal when there is no mask). Entries past ``lengths[b]`` that a
later call does not admit are garbage and may be overwritten at will.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from prism_trt.config import TreeShape
from prism_trt.errors import PrismError

LogitsFor = Literal["all", "last", "none"]


@dataclass(frozen=True)
class EngineLimits:
    """What an engine was built for."""

    slots: int
    """Requests that can hold K/V at once."""
    context: int
    """K/V entries per slot; prompt, output and the tree in flight must fit."""
    tokens_per_call: int
    """Largest B*T of one forward call; longer prefills are cut into chunks by the caller."""

    def check_positions(self, known: int) -> None:
        """Refuse contexts in which a target would meet positions that it does not know.

        Raises:
            PrismError: the context is longer than the target's `known` positions.
        """
        if self.context > known:
            raise PrismError(
                f"the context of {self.context} tokens exceeds the target's {known} positions: ask for a smaller "
                "context"
            )


@dataclass(frozen=True)
class TokenBatch:
    """Input of one forward call over a K/V pool."""

    tokens: Tensor
    """[B, T] int64."""
    positions: Tensor
    """[B, T] int64, rotary positions."""
    slots: Tensor
    """[B] int64."""
    lengths: Tensor
    """[B] int64, committed K/V entries of the slot before this call."""
    counts: Tensor
    """[B] int64, valid tokens per row (the rest of the row is padding: its K/V and outputs are garbage)."""
    mask: Tensor | None = None
    """[B, T, offset + T] bool: token i of row b may read in-flight entry j. None: causal, and offset is 0."""
    offset: int = 0
    """In-flight entries (earlier levels of the tree) already written past `lengths` by earlier calls."""

    @classmethod
    def one_row(cls, tokens: Tensor, length: int) -> TokenBatch:
        """The tokens [T] int64 that follow `length` committed ones in slot 0, causal."""
        count = len(tokens)
        row = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        positions = torch.arange(length, length + count, device=tokens.device)[None]
        return cls(tokens[None], positions, row, row + length, row + count)


@dataclass(frozen=True)
class TargetOutput:
    """Output of `Engine.forward`."""

    features: Tensor
    """[B, T, F] float32 or bfloat16: what the drafter is fed (`last`: hidden states after the final norm)."""
    logits: Tensor | None
    """[B, T, V] float32 for "all"; [B, 1, V] at each row's last valid token for "last"; None for "none".

    May be a view of a buffer that the engine's next call overwrites."""
    greedy: Tensor | None
    """[B, T] or [B, 1] int64: argmax of `logits`, ties to the lowest index."""


@dataclass(frozen=True)
class DraftOutput:
    """Output of one draft step."""

    logits: Tensor
    """[B, T, D] float32 over the draft vocabulary ([B, 1, D] at the last valid token for `Engine.extend`)."""
    hidden: Tensor
    """[B, T, H] the drafter's own hidden states ([B, 1, H] for `Engine.extend`): the next step's input."""


@dataclass(frozen=True)
class Tree:
    """Draft trees of B requests, nodes ordered so that a parent precedes its children; node 0 is the root."""

    tokens: Tensor
    """[B, N] int64 target-vocabulary ids; the root is the last committed token."""
    parents: Tensor
    """[B, N] int64; the root's parent is 0 (itself)."""
    depths: Tensor
    """[B, N] int64; the root has depth 0, a node drafted at step k depth k + 1."""
    mask: Tensor
    """[B, N, N] bool: node i descends from (or is) node j."""
    log_probs: Tensor
    """[B, N] float32 cumulative draft log-probability; 0 at the root."""


@runtime_checkable
class Engine(Protocol):
    """A target and, unless `drafter_steps` is 0, its drafter."""

    device: torch.device
    limits: EngineLimits
    vocab_size: int
    feature_size: int
    hidden_size: int
    has_drafter: bool
    draft_vocab: Tensor | None
    """[D] int64 target ids of the draft vocabulary; None when the drafter predicts the whole vocabulary."""
    default_tree: TreeShape
    """The tree to draft when a request names none."""

    def forward(self, batch: TokenBatch, logits_for: LogitsFor = "all") -> TargetOutput:
        """Run the target, writing its K/V."""
        ...

    def commit(self, slots: Tensor, lengths: Tensor, accepted: Tensor, counts: Tensor) -> None:
        """Compact the target's K/V after verification.

        For each row b, move the entries at ``lengths[b] + accepted[b, j]`` to ``lengths[b] + j`` for j < counts[b].
        `accepted` [B, A] int64 is strictly increasing over the first counts[b] entries of a row.
        """
        ...

    def extend(self, batch: TokenBatch, features: Tensor) -> DraftOutput:
        """Draft step 0: run module sigma(0) over newly committed tokens.

        Entry i of a row pairs the target's feature at position ``positions[b, i]`` (`features` [B, T, F]) with the
        token that follows it (`batch.tokens`). The draft K/V is written at ``lengths[b] + i``; lengths count committed
        draft entries.
        """
        ...

    def step(self, k: int, batch: TokenBatch, hidden: Tensor) -> DraftOutput:
        """Draft step k >= 1: run module sigma(k) over tree tokens with the drafter's own `hidden` [B, T, H]."""
        ...


def draft_vocab_size(engine: Engine) -> int:
    """D: words that the drafter of `engine` chooses among."""
    return engine.vocab_size if engine.draft_vocab is None else len(engine.draft_vocab)


@runtime_checkable
class PrefixCopyEngine(Engine, Protocol):
    """An engine that can copy K/V between slots."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of slot `source` to slot `target`, in the target and in the drafter."""
        ...


@runtime_checkable
class FusedDraftEngine(Engine, Protocol):
    """An engine that grows the whole tree in one call; must give the tree the generic loop would give."""

    def draft_round(self, batch: TokenBatch, features: Tensor, shape: TreeShape) -> Tree:
        """`extend` over `batch`, then grow a tree of `shape` below each row's last valid token."""
        ...


@dataclass(frozen=True)
class RoundOutput:
    """What a greedy round commits."""

    tokens: Tensor
    """[B, depth + 1] int64: accepted tokens, then the bonus token; the first `counts` of a row are valid."""
    counts: Tensor
    """[B] int64, at least 1."""
    drafted: Tensor
    """[B] int64: tree nodes verified, the root excluded."""
    features: Tensor
    """[B, depth + 1, F]: the target's features of the token before each of `tokens`."""


@runtime_checkable
class FusedRoundEngine(FusedDraftEngine, Protocol):
    """An engine that does a whole greedy round in one call, sparing the host its work between drafting and commit."""

    def speculate(self, batch: TokenBatch, features: Tensor, shape: TreeShape) -> RoundOutput:
        """`draft_round` less the nodes below `shape.min_probability`, `forward`, greedy verification and `commit`."""
        ...
