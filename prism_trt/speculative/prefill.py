"""Which prompt tokens the next step computes."""

from __future__ import annotations

from collections.abc import Sequence


def share(remaining: Sequence[int], budget: int) -> list[int]:
    """Tokens that each prompt gets in this step, `budget` at most in sum.

    The oldest prompt gets half of the budget, so that it ends however many others come; the rest goes to those that
    need least, so that short prompts do not wait behind long ones. What is left over goes to the oldest as well.

    Args:
        remaining: tokens that each prompt still needs, oldest first.
        budget: at least 1.
    """
    shares = [0] * len(remaining)
    reserved = min(remaining[0], (budget + 1) // 2)
    left = budget - reserved
    for i in sorted(range(1, len(remaining)), key=remaining.__getitem__):
        shares[i] = min(remaining[i], left)
        left -= shares[i]
    shares[0] = min(remaining[0], reserved + left)
    return shares


def group(counts: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of the rows of each call; rows without tokens are in none.

    A call has at most `limit` tokens, padding included, and at most half of them are padding.

    Args:
        counts: tokens of each row, none above `limit`.
        limit: `EngineLimits.tokens_per_call`.
    """
    calls: list[list[int]] = []
    total = 0
    for i in sorted((i for i, count in enumerate(counts) if count), key=lambda i: -counts[i]):
        if calls:
            padded = (len(calls[-1]) + 1) * counts[calls[-1][0]]
            if padded <= min(limit, 2 * (total + counts[i])):
                calls[-1].append(i)
                total += counts[i]
                continue
        calls.append([i])
        total = counts[i]
    return calls
