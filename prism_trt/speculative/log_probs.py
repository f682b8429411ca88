"""Log-probabilities of generated tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_ALTERNATIVES = 20
"""As in OpenAI's API."""


@dataclass(frozen=True)
class ScoredToken:
    """A generated token, and how likely the target thought it."""

    token: int
    log_prob: float
    """Natural logarithm; before temperature, top-k and top-p."""
    alternatives: tuple[tuple[int, float], ...]
    """The most probable tokens at this place and their log-probabilities, best first."""


def score_tokens(logits: Tensor, tokens: list[int], alternatives: int) -> list[ScoredToken]:
    """Look up generated tokens in the target's logits.

    Args:
        logits: [T, V] floating point, those that each of `tokens` was chosen by.
        tokens: T token ids.
        alternatives: most probable tokens to name for each.
    """
    log_probs = logits.float().log_softmax(-1)
    chosen = log_probs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best = log_probs.topk(min(alternatives, logits.shape[1]))
    ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        ScoredToken(token, log_prob, tuple(zip(words, values, strict=True)))
        for token, log_prob, (words, values) in zip(tokens, chosen, ranked, strict=True)
    ]
