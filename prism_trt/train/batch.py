"""Packed training batches: rows of several sequences, without padding.

Row t of a sequence pairs the token x_{t+1} with the target's feature h_t and predicts x_{t+2}. A sequence of p prompt
tokens and n tokens in all has features h_0 .. h_{n-2}. Its rows 0 .. p-2 are *prompt rows*: they are only attended to.
Its rows r = p-1 .. n-3 are *roots*: draft rounds start there when the drafter serves, so the loss is taken there.

Rows are indexed by root at every draft step: step k of root r reads the token x_{r+1+k} at position r+k, and its
teacher is the feature h_{r+1+k}. That is packed row i+k of step 0's arrays, so steps are shifts; roots within k rows of
their sequence's end have no step k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from prism_trt.data.sequences import FeatureSequence


@dataclass(frozen=True)
class SequenceSpan:
    """Where one sequence's rows lie in a packed batch."""

    prompt_start: int
    prompts: int
    root_start: int
    roots: int


@dataclass(frozen=True)
class PackedBatch:
    """Rows of several sequences: P prompt rows and N roots in all, F feature width, H hidden width."""

    spans: tuple[SequenceSpan, ...]
    prompt_tokens: Tensor
    """[P] int64: x_{t+1} of each prompt row."""
    prompt_features: Tensor
    """[P, F]: h_t."""
    prompt_positions: Tensor
    """[P] int64: t."""
    root_tokens: Tensor
    """[N] int64: x_{r+1}."""
    root_features: Tensor
    """[N, F]: h_r."""
    root_positions: Tensor
    """[N] int64: r."""
    teacher_features: Tensor
    """[N, H]: h_{r+1}, after the target's final norm."""
    next_tokens: Tensor
    """[N] int64: x_{r+2}, what step 0 should predict."""
    remaining: Tensor
    """[N] int64: later roots of the same sequence, so step k exists where ``remaining >= k``."""
    update_roots: tuple[int, ...]
    """Roots of every sequence of the update that this batch is a part of: what its losses are averaged over."""

    @property
    def rows(self) -> int:
        """N, the number of roots."""
        return len(self.root_tokens)

    def update_rows(self, step: int) -> int:
        """Roots of the whole update that have a draft step `step`; at least 1."""
        return max(1, sum(max(0, roots - step) for roots in self.update_roots))

    def to(self, device: torch.device) -> PackedBatch:
        """The batch with its tensors on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def pack(sequences: Sequence[FeatureSequence], update_roots: Sequence[int] | None = None) -> PackedBatch:
    """Pack `sequences`, each with at least one root.

    Args:
        update_roots: roots of every sequence of the update; None when `sequences` are the whole update.
    """
    spans, prompt_at, root_at = [], 0, 0
    for sequence in sequences:
        prompts = sequence.prompt_length - 1
        spans.append(SequenceSpan(prompt_at, prompts, root_at, sequence.roots))
        prompt_at, root_at = prompt_at + prompts, root_at + sequence.roots

    def prompt_part(first: int, name: str) -> Tensor:
        return torch.cat([getattr(s, name)[first : first + s.prompt_length - 1] for s in sequences])

    def root_part(first: int, name: str) -> Tensor:
        return torch.cat([getattr(s, name)[s.prompt_length + first :][: s.roots] for s in sequences])

    return PackedBatch(
        spans=tuple(spans),
        prompt_tokens=prompt_part(1, "tokens"),
        prompt_features=prompt_part(0, "features"),
        prompt_positions=torch.cat([torch.arange(span.prompts) for span in spans]),
        root_tokens=root_part(0, "tokens"),
        root_features=root_part(-1, "features"),
        root_positions=torch.cat([torch.arange(span.roots) + span.prompts for span in spans]),
        teacher_features=root_part(0, "teacher"),
        next_tokens=root_part(1, "tokens"),
        remaining=torch.cat([torch.arange(span.roots - 1, -1, -1) for span in spans]),
        update_roots=tuple(span.roots for span in spans) if update_roots is None else tuple(update_roots),
    )
