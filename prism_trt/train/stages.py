"""The training stages, their learning rates and their data order: pure functions of the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from prism_trt.config import TrainConfig
from prism_trt.data.packing import pack_lengths
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
    top_k_weight: float
    """Weight of HASS's top-K loss, in units of the cross-entropy's."""
    noise: float
    modules: int
    signature: str
    """Digest of every option that decides the weights at the end of this stage, earlier stages included."""


def stages(config: TrainConfig) -> list[Stage]:
    """The stages of `config.kind` in order, those without updates included.

    one_step is EAGLE training; alignment is HASS (the gradient is stopped between steps, and kind hass adds its top-K
    loss); tuning copies the module M times and lets the gradient flow through all steps (PRISM).
    """
    is_lm = config.kind == "standard"
    top_k = config.alignment_top_k_weight / config.cross_entropy_weight if config.kind == "hass" else 0.0
    options: dict[str, dict[str, Any]] = {
        "one_step": {
            "updates": config.one_step_updates,
            "lr": config.one_step_lr,
            "steps": 1,
            "detach": True,
            "hidden_weight": 0.0 if is_lm else config.hidden_weight,
            "top_k_weight": 0.0,
            "noise": 0.0 if is_lm else config.noise,
            "modules": 1,
        },
        "alignment": {
            "updates": config.alignment_updates,
            "lr": config.alignment_lr,
            "steps": config.alignment_steps,
            "detach": True,
            "hidden_weight": config.hidden_weight,
            "top_k_weight": top_k,
            "noise": 0.0,
            "modules": 1,
        },
        "tuning": {
            "updates": config.tuning_updates,
            "lr": config.tuning_lr,
            "steps": config.tuning_steps,
            "detach": False,
            "hidden_weight": config.tuning_hidden_weight,
            "top_k_weight": 0.0,
            "noise": 0.0,
            "modules": config.modules,
        },
    }
    names = {"prism": 3, "hass": 2, "eagle2": 1, "standard": 1}[config.kind]
    own = {name: {field for field in TrainConfig.model_fields if field.startswith(f"{name}_")} for name in options}
    own["tuning"] |= {"modules", "step_map", "kv_mode"}
    unsigned = {"kind", "log_every", "save_every", "simulate_every", "rows_per_pass"}.union(*own.values())
    values: dict[str, Any] = config.model_dump(exclude=unsigned) | {"is_lm": is_lm}
    result = []
    for number, (name, fields) in enumerate(list(options.items())[:names]):
        values |= config.model_dump(include=own[name]) | {"top_k_weight": fields["top_k_weight"]}
        result.append(Stage(name=name, number=number, signature=sha256_json(values), **fields))
    return result


def learning_rate(update: int, stage: Stage, config: TrainConfig) -> float:
    """Linear warm-up to ``stage.lr``, then a cosine down to ``stage.lr * config.final_lr`` at the last update."""
    warm = max(1, round(config.warmup * stage.updates))
    if update < warm:
        return stage.lr * (update + 1) / warm
    share = (update - warm + 1) / max(1, stage.updates - warm)
    return stage.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * share)))


class DataOrder:
    """Which sequences each update of a stage trains on: a pure function of (seed, stage, update).

    Every epoch packs all sequences anew into updates of at most the wanted rows; a longer sequence has one of its own.
    """

    def __init__(self, roots: np.ndarray, rows_per_update: int, seed: int, stage: int) -> None:
        """`roots` [n] int: rows of each sequence that carry a loss."""
        self._fitting = np.flatnonzero(roots <= rows_per_update)
        self._long = np.flatnonzero(roots > rows_per_update)
        self._roots = roots
        self._rows = rows_per_update
        self._seed = (seed, stage)
        self._epoch, self._first = 0, 0
        self._packs = self._pack(0)

    def at(self, update: int) -> np.ndarray:
        """Indices of the sequences of one update."""
        if update < self._first:
            self._epoch, self._first = 0, 0
            self._packs = self._pack(0)
        while update >= self._first + len(self._packs):
            self._epoch, self._first = self._epoch + 1, self._first + len(self._packs)
            self._packs = self._pack(self._epoch)
        return self._packs[update - self._first]

    def _pack(self, epoch: int) -> list[np.ndarray]:
        seed = (*self._seed, epoch)
        packs = [self._fitting[pack] for pack in pack_lengths(self._roots[self._fitting], self._rows, seed)]
        packs += [self._long[i : i + 1] for i in range(len(self._long))]
        return [packs[i] for i in np.random.default_rng(seed).permutation(len(packs))] if len(self._long) else packs


def cut(roots: np.ndarray, parts: int) -> list[np.ndarray]:
    """Positions of the sequences of an update in each of `parts` parts of nearly equal rows, some perhaps empty.

    Args:
        roots: [n] rows of the update's sequences.
    """
    before = np.cumsum(roots) - roots
    part = (before + roots / 2) * parts // max(1, int(roots.sum()))
    return [np.flatnonzero(part == number) for number in range(parts)]
