"""Comparing samples with an exact distribution."""

from __future__ import annotations

import torch
from torch import Tensor


def p_value(samples: Tensor, tables: list[Tensor]) -> float:
    """Chi-square test of three tokens' joint distribution against the target's; cells expected below 5 are pooled.

    Args:
        samples: [S, 3] int64.
        tables: [V], [V, V] and [V, V, V]: the target's distributions after prefixes of 0, 1 and 2 tokens.
    """
    vocab = len(tables[0])
    expected = (tables[0][:, None, None] * tables[1][:, :, None] * tables[2]).double().flatten()
    index = samples @ torch.tensor([vocab**2, vocab, 1])
    observed = torch.bincount(index, minlength=vocab**3).double()
    assert observed[expected == 0].sum() == 0
    expected *= len(samples) / expected.sum()
    small = expected < 5
    observed = torch.cat([observed[~small], observed[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    freedom = torch.tensor(len(expected) - 1, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, torch.tensor(statistic, dtype=torch.float64) / 2).item()
