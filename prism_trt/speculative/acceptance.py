"""How many drafted tokens a tree gets accepted: a model with few parameters, and their running estimates.

The model: a node drafted at step k that is the likeliest child of an accepted node is accepted with chance `first[k]`.
When it is not, the next likeliest is accepted with chance `others` (but never with more than `first[k]`), and so on.
The chance of a node is the product along its path, as in Sequoia (Chen et al. 2024, section 3.1), and a tree is grown
by the rules of `prism_trt.speculative.tree` with these chances in place of the draft's probabilities. The sum over its
nodes is the expected number accepted. It grows with every chance, and with a tree's size, width and depth.

Real trees follow the draft's confidence in each case, which the model leaves out. So `first` is fitted to what the
trees in use get accepted, and each shape has a factor of its own for what then remains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from prism_trt.config import DrafterConfig, TreeShape

Array = NDArray[np.float64]

MOST_STEPS = 16
"""The deepest tree there is (`TreeShape.depth`)."""
_LEAST, _MOST = 0.01, 0.98
_PRUNED_SHARE = 0.8
"""Of what the model expects of a tree, what is assumed to be left without its improbable nodes."""


@dataclass(frozen=True)
class AcceptancePrior:
    """What is assumed before anything was observed; worth a few rounds of one request."""

    first: tuple[float, ...] = (0.5,)
    """Chance of the likeliest child by draft step; the last entry counts for later steps."""
    others: float = 0.2
    """Chance of each further child when no likelier one was accepted."""

    @classmethod
    def of(cls, drafter: DrafterConfig | None) -> AcceptancePrior:
        """From the acceptance that training simulated on answers held back; cautious where there is none."""
        simulated = (None if drafter is None else drafter.provenance.get("simulated_acceptance")) or {}
        first, among_four = simulated.get("top1"), simulated.get("top4")
        if not first or not among_four:
            return cls()
        missed = (1 - among_four[0]) / (1 - first[0]) if first[0] < among_four[0] < 1 else 1.0
        return cls(tuple(first), 1 - missed ** (1 / 3))


def node_chances(first: Sequence[float], others: float, width: int, depth: int) -> list[Array]:
    """Chance that each drafted node is accepted: one array per depth 1..`depth`, [width] and then [width * width].

    Args:
        first: chance of the likeliest child by draft step, at least `depth` entries.
        others: chance of each further child when no likelier one was accepted.
    """
    levels: list[Array] = []
    expanded: Array = np.ones(1)
    for k in range(depth):
        next_best = min(others, first[k])
        later = next_best * (1 - next_best) ** np.arange(width - 1)
        children = np.concatenate(([first[k]], (1 - first[k]) * later))
        levels.append(np.outer(expanded, children).ravel())
        expanded = np.sort(levels[-1])[::-1][:width]
    return levels


def reached(levels: Sequence[Array], shape: TreeShape) -> tuple[float, ...]:
    """Chance that at least 1, 2, ... `shape.depth` nodes of a tree are accepted, from `node_chances` of its width."""
    levels = levels[: shape.depth]
    chances = np.concatenate(levels)
    # Stable, so that of equal chances the shallower node is kept, as in the tree.
    kept = np.argsort(-chances, kind="stable")[: shape.size - 1]
    depth_of = np.repeat(np.arange(len(levels)), [len(level) for level in levels])
    sums = np.bincount(depth_of[kept], chances[kept], minlength=shape.depth)
    return tuple(float(chance) for chance in sums)


@dataclass
class _Average:
    """A running average over the last `_WINDOW` observations or so."""

    value: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float, window: float) -> None:
        total = self.weight + weight
        self.value += (value - self.value) * weight / total
        self.weight = min(total, window)


@dataclass
class AcceptanceEstimate:
    """Running estimates of the model's parameters from rounds of any shapes."""

    prior: AcceptancePrior
    _steps: list[_Average] = field(default_factory=lambda: [_Average() for _ in range(MOST_STEPS)])
    _factors: dict[TreeShape, _Average] = field(default_factory=dict)
    _sizes: dict[TreeShape, _Average] = field(default_factory=dict)
    _rounds: int = 0
    """Since the model was evaluated, which is done again after `REFRESH`, and sooner while little is known."""
    _evaluated: list[float] = field(default_factory=list)
    _reached: dict[TreeShape, tuple[float, ...]] = field(default_factory=dict)

    WINDOW = 200.0
    """Rounds of one request that an average looks back."""
    PRIOR_WEIGHT = 8.0
    """Rounds of one request that the prior is worth."""
    REFRESH = 16

    def __post_init__(self) -> None:
        self._evaluated = self.first

    @property
    def first(self) -> list[float]:
        """Estimated chance of the likeliest child by draft step.

        A step that was seldom reached is taken to deviate from its prior as the step before does.
        """
        chances, ratio = [], 1.0
        for k, step in enumerate(self._steps):
            prior = self.prior.first[min(k, len(self.prior.first) - 1)]
            expected = _bounded(prior * ratio)
            chance = (self.PRIOR_WEIGHT * expected + step.weight * step.value) / (self.PRIOR_WEIGHT + step.weight)
            chances.append(_bounded(chance))
            ratio = chances[-1] / prior
        return chances

    def accepted(self, shape: TreeShape) -> float:
        """Expected number of accepted drafted tokens of a round of one request."""
        return sum(self._chances(shape)) * min(2.0, max(0.5, self._factor(shape).value))

    def drafted(self, shape: TreeShape) -> float:
        """Expected nodes of a tree besides the root; fewer than its size where improbable ones are left out."""
        if not shape.min_probability:
            return shape.size - 1
        return self._sizes.setdefault(shape, _Average((shape.size - 1) / 2, self.PRIOR_WEIGHT)).value

    def observe(self, shape: TreeShape, accepted: Sequence[int], drafted: float) -> None:
        """Learn from a round in which each request had so many of its drafted tokens accepted.

        Args:
            drafted: nodes of a tree besides the root, on average.
        """
        if shape.min_probability:
            self.drafted(shape)
            self._sizes[shape].add(drafted, len(accepted), self.WINDOW)
        chances = (1.0, *self._chances(shape))
        for k in range(shape.depth):
            trials = sum(count >= k for count in accepted)
            if not trials or not chances[k + 1]:
                break
            share = sum(count > k for count in accepted) / trials
            # The step's chance that would have made the model expect this share, to first order.
            self._steps[k].add(_bounded(self._evaluated[k] * share * chances[k] / chances[k + 1]), trials, self.WINDOW)
        expected = sum(chances[1:])
        self._factor(shape).add(sum(accepted) / (len(accepted) * expected), len(accepted), self.WINDOW)
        self._rounds += 1
        if self._rounds >= min(self.REFRESH, self._steps[0].weight / 4):
            self._rounds = 0
            self._evaluated = self.first
            self._reached.clear()

    def _factor(self, shape: TreeShape) -> _Average:
        expected = _PRUNED_SHARE if shape.min_probability else 1.0
        return self._factors.setdefault(shape, _Average(expected, 2 * self.PRIOR_WEIGHT))

    def _chances(self, shape: TreeShape) -> tuple[float, ...]:
        if shape not in self._reached:
            levels = node_chances(self._evaluated, self.prior.others, shape.width, shape.depth)
            self._reached[shape] = reached(levels, shape)
        return self._reached[shape]


def _bounded(chance: float) -> float:
    return min(_MOST, max(_LEAST, chance))
