"""Which module serves which draft step, chosen from how hard the steps are (`--step-map auto`)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise


def step_map_of_difficulty(acceptance: Sequence[float], modules: int) -> tuple[int, ...]:
    """Cut the steps into `modules` runs of similar difficulty: the cut with the least squared deviation inside runs.

    Step 0 reads true features and every later step its predecessor's, so modules serve runs of neighbouring steps.

    Args:
        acceptance: measured share of right first choices of steps 0, 1, ..., those that tuning trains; at least
            `modules` of them.

    Raises:
        ValueError: there are fewer steps than modules.
    """
    steps = len(acceptance)
    if steps < modules:
        raise ValueError(f"{steps} steps cannot be shared among {modules} modules")

    def deviation(run: Sequence[float]) -> float:
        mean = sum(run) / len(run)
        return sum((share - mean) ** 2 for share in run)

    def cost(cuts: tuple[int, ...]) -> float:
        borders = (0, *cuts, steps)
        return sum(deviation(acceptance[a:b]) for a, b in pairwise(borders))

    cuts = min(combinations(range(1, steps), modules - 1), key=cost)
    return tuple(sum(step >= cut for cut in cuts) for step in range(steps))
