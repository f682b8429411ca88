"""Which answers are held back from training, to simulate the acceptance length on them."""

from __future__ import annotations

import numpy as np

from prism_trt.config import SIMULATED_STEPS, TrainConfig
from prism_trt.data.regenerate import first_answers
from prism_trt.errors import PrismError


def hold_back(roots: np.ndarray, greedy: np.ndarray, config: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the answers held back (greedy ones, chosen by the seed) and of those trained on.

    Args:
        roots: [n] rows of each answer that carry a loss.
        greedy: [n] bool.

    Raises:
        PrismError: more than half of the answers would be held back, or all greedy ones, or none is left to train on;
            or the step map cannot be measured on those held back.
    """
    usable = np.flatnonzero(roots > 0)
    candidates = usable[greedy[usable]]
    held_back = np.sort(np.random.default_rng(config.seed).permutation(candidates)[: config.hold_back])
    training = np.setdiff1d(usable, held_back)
    if config.max_answers:
        training = first_answers(training, config.max_answers, config.seed)
    if not len(usable):
        raise PrismError("no answer has two tokens, so none is left to train on: add prompts")
    if 2 * len(held_back) > len(usable):
        raise PrismError(
            f"--hold-back {config.hold_back} would hold back {len(held_back)} of {len(usable)} answers, more than "
            "half: add prompts or lower --hold-back"
        )
    if len(held_back) and len(held_back) == len(candidates):
        raise PrismError(
            f"--hold-back {config.hold_back} would hold back all {len(held_back)} greedy answers, so only sampled ones "
            "are left to train on: add prompts or lower --hold-back or --sampled-share"
        )
    if config.measures_step_map and not (roots[held_back] >= SIMULATED_STEPS).any():
        raise PrismError(
            f"--step-map auto measures {SIMULATED_STEPS} draft steps, but no answer held back has so many tokens to "
            "draft: lower --sampled-share, raise --max-new-tokens, or name the step map"
        )
    return held_back, training
