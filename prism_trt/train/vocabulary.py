"""The draft vocabulary: the tokens a drafter can predict."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def choose_draft_vocab(counts: np.ndarray, size: int, always: Iterable[int]) -> Tensor | None:
    """The `size` most frequent tokens and those of `always` among them; [size] int64 ascending.

    Args:
        counts: [V] occurrences of each token in the training data; ties go to the lower id.
        size: 0 or at least V means the whole vocabulary, for which there is no map (None).
    """
    if size == 0 or size >= len(counts):
        return None
    weight = counts.astype(np.int64)
    weight[list(always)] = np.iinfo(np.int64).max
    chosen = np.argsort(-weight, kind="stable")[:size]
    return torch.from_numpy(np.sort(chosen))
