"""The training stages, their learning rates and their data order: pure functions of the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from prism_trt.config import TrainConfig
from prism_trt.manifest import sha256_json


@dataclass(frozen=True)
class Stage:
    """One stage: what a draft module learns from, and for how long."""

    name: str
    number: int
    updates: int
    lr: float
    steps: int
    """Draft steps per update (K)."""
    detach: bool
    """Stop the gradient between draft steps."""
    hidden_weight: float
    noise: float
    modules: int
    signature: str
    """Digest of every option that decides the weights at the end of this stage, earlier stages included."""


def stages(config: TrainConfig) -> list[Stage]:
    """The stages of `config` in order, those without updates included.

    one_step is EAGLE training; alignment is HASS (the gradient is stopped between steps); tuning copies the module M
    times and lets the gradient flow through all steps (PRISM).
    """
    one_step = (config.one_step_updates, config.one_step_lr, 1, True, config.hidden_weight, config.noise, 1)
    alignment = (
        config.alignment_updates,
        config.alignment_lr,
        config.alignment_steps,
        True,
        config.hidden_weight,
        0.0,
        1,
    )
    tuning = (
        *(config.tuning_updates, config.tuning_lr, config.tuning_steps),
        *(False, config.tuning_hidden_weight, 0.0, config.modules),
    )
    cosmetic = {"log_every", "save_every", "simulate_every"}
    own = {name: {field for field in TrainConfig.model_fields if field.startswith(f"{name}_")} for name in _NAMES}
    own["tuning"].add("modules")
    values = config.model_dump(exclude=cosmetic | set().union(*own.values()))
    result = []
    for number, (name, options) in enumerate(zip(_NAMES, (one_step, alignment, tuning), strict=True)):
        values |= config.model_dump(include=own[name])
        result.append(Stage(name, number, *options, signature=sha256_json(values)))
    return result


_NAMES = ("one_step", "alignment", "tuning")


def learning_rate(update: int, stage: Stage, config: TrainConfig) -> float:
    """Linear warm-up to ``stage.lr``, then a cosine down to ``stage.lr * config.final_lr`` at the last update."""
    warm = max(1, round(config.warmup * stage.updates))
    if update < warm:
        return stage.lr * (update + 1) / warm
    share = (update - warm + 1) / max(1, stage.updates - warm)
    return stage.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * share)))


class DataOrder:
    """Which sequences each update of a stage trains on: a pure function of (seed, stage, update).

    Every epoch is a new permutation of all sequences, cut into packs of nearly equal numbers of rows.
    """

    def __init__(self, roots: np.ndarray, rows_per_update: int, seed: int, stage: int) -> None:
        """`roots` [n] int: rows of each sequence that carry a loss."""
        self._roots = roots
        self._packs = max(1, round(int(roots.sum()) / rows_per_update))
        self._seed = (seed, stage)
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def at(self, update: int) -> np.ndarray:
        """Indices of the sequences of one update."""
        epoch, position = divmod(update, self._packs)
        if self._epoch[0] != epoch:
            order = np.random.default_rng((*self._seed, epoch)).permutation(len(self._roots))
            before = np.cumsum(self._roots[order]) - self._roots[order]
            pack = before * self._packs // max(1, int(self._roots.sum()))
            # A sequence longer than a pack may leave the next ones empty: cut by number of sequences then.
            packs = [order[pack == number] for number in range(self._packs)]
            if any(len(members) == 0 for members in packs):
                packs = np.array_split(order, min(self._packs, len(order)))
            self._epoch = (epoch, packs)
        packs = self._epoch[1]
        return packs[position % len(packs)]
