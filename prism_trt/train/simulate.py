"""The acceptance length a drafter would have, simulated without decoding.

On greedy answers the target's first choice is the next token, so teacher forcing tells which drafts would be accepted.
The forward pass is the aligned one, which equals serving; a drafter that looks good here is good when it serves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from prism_trt.config import SIMULATED_STEPS
from prism_trt.drafter.model import Drafter
from prism_trt.train.alignment import aligned_steps
from prism_trt.train.batch import PackedBatch
from prism_trt.train.losses import CHUNK_ROWS

STEPS = SIMULATED_STEPS
CHOICES = 4


@dataclass(frozen=True)
class SimulatedAcceptance:
    """Acceptance of a chain of 5 steps over all roots that have 5 following tokens."""

    roots: int
    """How many there are; the shares and lengths of none say nothing."""
    top1: tuple[float, ...]
    """Per step: share of roots whose first choice is right given the true tokens before it."""
    top4: tuple[float, ...]
    """The same for the true token being among the first four choices."""
    chain: float
    """Acceptance length of a greedy chain: 1 + the mean number of leading right steps."""
    chain_top4: float
    """The same when each step counts as right by its first four choices: a bound for trees of width 4."""
    agreement: float | None = None
    """Share of all roots, followed by 5 tokens or not, where step 0 agrees with the target as training measures it."""


@dataclass(frozen=True)
class VocabularyLoss:
    """What the reduced draft vocabulary costs on the answers held back."""

    coverage: float
    """Share of their tokens that the drafter can predict."""
    chain: float
    """Acceptance length of a greedy chain, as in `SimulatedAcceptance`."""
    chain_whole_vocabulary: float
    """The same if the drafter predicted with the target's whole head."""


@torch.inference_mode()
def simulate_acceptance(
    drafter: Drafter,
    embedding: Tensor,
    head: Tensor,
    batches: Iterable[PackedBatch],
    compute: torch.dtype,
    whole_vocabulary: bool = False,
    teacher_head: Tensor | None = None,
) -> SimulatedAcceptance:
    """Simulate on packed greedy answers.

    Args:
        embedding: [V, H] the target's embedding table.
        head: [D, h] the head rows that `drafter` predicts with.
        compute: dtype of the matrix products.
        whole_vocabulary: `head` is [V, h] instead, and every token can be predicted.
        teacher_head: [D, H] the target's head rows of the draft vocabulary, to measure the agreement.
    """
    head = head.to(compute)
    hits: list[Tensor] = []
    agreed: list[Tensor] = []
    for batch in batches:
        usable = batch.remaining >= STEPS - 1
        with torch.autocast(head.device.type, torch.bfloat16, enabled=compute == torch.bfloat16):
            hidden = aligned_steps(drafter, embedding, batch, STEPS)
        if teacher_head is not None:
            choices = _first_choices(hidden[0], head), _first_choices(batch.teacher_features, teacher_head.to(compute))
            agreed.append((choices[0] == choices[1]).cpu())
        ranks = []
        for step, states in enumerate(hidden):
            labels = batch.next_tokens.roll(-step)[usable]
            wanted = labels if whole_vocabulary else _drafted(drafter, labels)
            ranks.append(_ranks(states[usable].to(head.dtype), head, wanted))
        hits.append(torch.stack(ranks, dim=1).cpu())
    ranks_all = torch.cat(hits) if hits else torch.zeros(0, STEPS, dtype=torch.int64)
    first, four = (ranks_all < 1).double(), (ranks_all < CHOICES).double()
    count = max(1, len(ranks_all))
    return SimulatedAcceptance(
        roots=len(ranks_all),
        top1=tuple((first.sum(0) / count).tolist()),
        top4=tuple((four.sum(0) / count).tolist()),
        chain=1 + float(first.cumprod(1).sum()) / count,
        chain_top4=1 + float(four.cumprod(1).sum()) / count,
        agreement=float(torch.cat(agreed).double().mean()) if agreed else None,
    )


def vocabulary_loss(
    drafter: Drafter,
    embedding: Tensor,
    target_head: Tensor,
    batches: list[PackedBatch],
    compute: torch.dtype,
    restricted: SimulatedAcceptance,
) -> VocabularyLoss:
    """Compare `restricted`, simulated on the same `batches`, with predicting by the whole `target_head` [V, H]."""
    labels = torch.cat([batch.next_tokens for batch in batches])
    whole = simulate_acceptance(drafter, embedding, target_head, batches, compute, whole_vocabulary=True)
    covered = (_drafted(drafter, labels) >= 0).double().mean()
    return VocabularyLoss(float(covered), restricted.chain, whole.chain)


def _drafted(drafter: Drafter, labels: Tensor) -> Tensor:
    """Indices of `labels` in the draft vocabulary, -1 for those outside."""
    vocab = drafter.draft_vocab
    if vocab is None:
        return labels
    vocab = vocab.to(labels.device)
    index = torch.searchsorted(vocab, labels).clamp(max=len(vocab) - 1)
    return torch.where(vocab[index] == labels, index, -1)


def _first_choices(states: Tensor, head: Tensor) -> Tensor:
    """[n] int64: the rows of `head` that score highest."""
    pieces = states.to(head.dtype).split(CHUNK_ROWS)
    return torch.cat([functional.linear(piece, head).argmax(-1) for piece in pieces])


def _ranks(states: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """[n] int64: how many tokens score higher than the label; a label of -1 ranks last."""
    ranks = []
    for first in range(0, len(states), CHUNK_ROWS):
        part = labels[first : first + CHUNK_ROWS]
        logits = functional.linear(states[first : first + CHUNK_ROWS], head)
        own = logits.gather(1, part.clamp(min=0).unsqueeze(1))
        ranks.append(torch.where(part < 0, head.shape[0], (logits > own).sum(1)))
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)
