"""The training loop: stages of updates over a feature cache, with checkpoints and measurements."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from prism_trt.config import DrafterConfig, TrainConfig
from prism_trt.data.feature_cache import FeatureCache
from prism_trt.drafter.checkpoint import weights_sha256
from prism_trt.drafter.model import Drafter, copy_modules
from prism_trt.errors import PrismError
from prism_trt.manifest import sha256_json
from prism_trt.target.loading import Target
from prism_trt.train.alignment import aligned_steps
from prism_trt.train.batch import PackedBatch, pack
from prism_trt.train.checkpoints import LATEST, RunState, find_state, save_state, stage_file
from prism_trt.train.losses import StepMetrics, hidden_loss, soft_cross_entropy
from prism_trt.train.optimizer import StageOptimizer
from prism_trt.train.simulate import SimulatedAcceptance, simulate_acceptance
from prism_trt.train.stages import DataOrder, Stage, learning_rate, stages
from prism_trt.train.vocabulary import choose_draft_vocab


@dataclass(frozen=True)
class UpdateReport:
    """One update, as told to observers."""

    stage: Stage
    update: int
    """Updates done in the stage, this one included."""
    rows: int
    seconds: float
    lr: float
    gradient_norm: float
    measured: Measurement | None
    """Only every `TrainConfig.log_every` updates, because it costs extra passes over the logits."""


@dataclass(frozen=True)
class Measurement:
    """Losses and accuracy of one update, on the data it trained on."""

    loss: float
    hidden: float
    cross_entropy: tuple[float, ...]
    """Per draft step."""
    agreement: tuple[float, ...]
    """Per draft step: share of rows where the drafter's first choice is the target's."""


class Observer(Protocol):
    """Told about the progress of a run."""

    def started(self, planned: list[Stage], stage: int, update: int) -> None:
        """The run begins, or continues after `update` updates of `stage`."""

    def updated(self, report: UpdateReport) -> None:
        """An update was done."""

    def simulated(self, stage: Stage, update: int, acceptance: SimulatedAcceptance) -> None:
        """The acceptance length was simulated."""


@dataclass(frozen=True)
class TrainingResult:
    """A trained drafter and what is known about its training."""

    drafter: Drafter
    rows: int
    seconds: float
    acceptance: SimulatedAcceptance | None
    """At the end, on the answers held back; None without such."""


class Trainer:
    """Trains one drafter on one feature cache. The result depends on configuration, data and thread count only."""

    def __init__(
        self, target: Target, cache: FeatureCache, config: TrainConfig, work: Path, init: Drafter | None = None
    ) -> None:
        """Prepare a run whose checkpoints live in `work`.

        Args:
            init: drafter of one module to start from; it keeps its shape and draft vocabulary.

        Raises:
            PrismError: the cache leaves nothing to train on, or `init` has several modules.
        """
        if init is not None and init.config.num_modules > 1:
            raise PrismError(
                f"the initial drafter has {init.config.num_modules} modules: pass one with a single module, "
                "which the stages before tuning train"
            )
        self._config = config
        self._cache = cache
        self._work = work
        self._stages = stages(config)
        self._signatures = [
            sha256_json([stage.signature, cache.data_sha256, target.fingerprint, init and weights_sha256(init)])
            for stage in self._stages
        ]
        self._compute = torch.bfloat16 if config.compute == "bfloat16" else torch.float32
        self._held_back, self._training = _split(cache, config)
        if init is None:
            counts = cache.token_counts(self._training, target.config.vocab_size)
            vocab = choose_draft_vocab(counts, config.draft_vocab_size, target.tokenizer.eos_token_ids)
            init = _new_drafter(target, config, vocab)
        self._first = init
        with torch.no_grad():
            self._embedding = target.model.model.embed_tokens.weight.to(self._compute)
            self._head = self._first.head_rows(target.model.head_weight).to(self._compute).contiguous()

    def run(self, observers: list[Observer]) -> TrainingResult:
        """Train, or continue from the last checkpoint in the work directory, to the end of the last stage.

        Raises:
            PrismError: the loss is no longer finite (the last checkpoint stays), or the work directory holds another
                run.
        """
        state = find_state(self._work, self._stages, self._signatures)
        first, done = (state.stage, state.update) if state else (0, 0)
        drafter = _for_stage(self._first, self._stages[first])
        if state:
            drafter.load_state_dict(state.drafter)
        rows, seconds = (state.rows, state.seconds) if state else (0, 0.0)
        for observer in observers:
            observer.started(self._stages, first, done)

        acceptance = None
        for stage in self._stages[first:]:
            if stage.number > first:
                drafter, done, state = _for_stage(drafter, stage), 0, None
            optimizer = StageOptimizer(drafter, self._config)
            if state:
                optimizer.load_state_dict(state.optimizer)
            order = DataOrder(
                self._cache.roots[self._training], self._config.rows_per_update, self._config.seed, stage.number
            )
            for update in range(done, stage.updates):
                began = time.perf_counter()
                report = self._update(drafter, optimizer, stage, update, self._batch(order.at(update)))
                last = update + 1 == stage.updates
                seconds += time.perf_counter() - began
                rows += report.rows
                for observer in observers:
                    observer.updated(report)
                if last or (update + 1) % self._config.save_every == 0:
                    current = RunState(
                        *(self._signatures[stage.number], stage.number, update + 1, rows, seconds),
                        *(drafter.state_dict(), optimizer.state_dict()),
                    )
                    save_state(current, self._work / LATEST)
                    if last:
                        save_state(current, self._work / stage_file(stage))
                if len(self._held_back) and (last or (update + 1) % self._config.simulate_every == 0):
                    acceptance = self._simulate(drafter)
                    for observer in observers:
                        observer.simulated(stage, update + 1, acceptance)
        if acceptance is None and len(self._held_back):
            acceptance = self._simulate(drafter)
        return TrainingResult(drafter.eval(), rows, seconds, acceptance)

    def _update(
        self, drafter: Drafter, optimizer: StageOptimizer, stage: Stage, update: int, batch: PackedBatch
    ) -> UpdateReport:
        began = time.perf_counter()
        config = self._config
        wanted = update % config.log_every == 0 or update + 1 == stage.updates
        metrics = StepMetrics.zeros(stage.steps) if wanted else None
        noise = torch.Generator().manual_seed(_noise_seed(config.seed, stage.number, update))
        with torch.autocast("cpu", torch.bfloat16, enabled=self._compute == torch.bfloat16):
            hidden = aligned_steps(
                drafter, self._embedding, batch, stage.steps, detach=stage.detach, noise=stage.noise, generator=noise
            )
            distance = hidden_loss(hidden, batch) if stage.hidden_weight else torch.zeros(())
            cross_entropy = soft_cross_entropy(hidden, batch, self._head, metrics)
            loss = stage.hidden_weight * distance + config.cross_entropy_weight * cross_entropy
        loss.backward()
        norm = optimizer.clip()
        if not math.isfinite(norm):
            raise PrismError(
                f"the loss is no longer finite at update {update + 1} of stage {stage.name}: lower "
                f"--{stage.name.replace('_', '-')}-lr (what was saved before is kept in {self._work})"
            )
        lr = learning_rate(update, stage, config)
        optimizer.step(lr)
        measured = None
        if metrics is not None:
            rows = metrics.rows.clamp(min=1)
            measured = Measurement(
                loss=float(loss.detach()),
                hidden=float(distance.detach()),
                cross_entropy=tuple((metrics.cross_entropy / rows).tolist()),
                agreement=tuple((metrics.agreement / rows).tolist()),
            )
        return UpdateReport(stage, update + 1, batch.rows, time.perf_counter() - began, lr, norm, measured)

    def _batch(self, members: np.ndarray) -> PackedBatch:
        return pack([self._cache.sequence(int(self._training[member])) for member in members])

    def _simulate(self, drafter: Drafter) -> SimulatedAcceptance:
        return simulate_acceptance(drafter, self._embedding, self._head, self._held_back_batches(), self._compute)

    def _held_back_batches(self) -> Iterator[PackedBatch]:
        """Batches of at most 8 sequences, because all draft steps of a batch are held at once."""
        for first in range(0, len(self._held_back), 8):
            yield pack([self._cache.sequence(int(index)) for index in self._held_back[first : first + 8]])


def _split(cache: FeatureCache, config: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the sequences held back (greedy ones, chosen by the seed) and of those trained on."""
    usable = np.flatnonzero(cache.roots > 0)
    candidates = usable[cache.greedy[usable]]
    held_back = np.sort(np.random.default_rng(config.seed).permutation(candidates)[: config.hold_back])
    training = np.setdiff1d(usable, held_back)
    if not len(training):
        raise PrismError(
            f"the feature cache {cache.directory} has {len(usable)} usable answers and {len(held_back)} are held back, "
            "so none is left to train on: add prompts or lower --hold-back"
        )
    return held_back, training


def _new_drafter(target: Target, config: TrainConfig, vocab: Tensor | None) -> Drafter:
    """A randomly initialised drafter of one module in the target's shape."""
    shape = target.config
    drafter_config = DrafterConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=config.intermediate_size or shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
        rope_scaling=shape.rope_scaling,
        num_modules=1,
        step_map=(0,),
        draft_vocab_size=None if vocab is None else len(vocab),
        target_fingerprint=target.fingerprint,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Drafter(drafter_config, vocab)


def _for_stage(drafter: Drafter, stage: Stage) -> Drafter:
    """`drafter` with the number of modules that `stage` trains."""
    if drafter.config.num_modules == stage.modules:
        return drafter
    return copy_modules(drafter, stage.modules, tuple(range(stage.modules)))


def _noise_seed(seed: int, stage: int, update: int) -> int:
    return int(np.random.SeedSequence((seed, stage, update)).generate_state(1, np.uint64)[0] >> np.uint64(1))
