"""The training loop: stages of updates over a feature cache, with checkpoints and measurements."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from prism_trt.config import DrafterConfig, TrainConfig
from prism_trt.data.sequences import FeatureSequence
from prism_trt.drafter.checkpoint import weights_sha256
from prism_trt.drafter.model import Drafter, copy_modules
from prism_trt.errors import PrismError
from prism_trt.manifest import sha256_json
from prism_trt.target.loading import Target
from prism_trt.train.alignment import feature_noise
from prism_trt.train.batch import PackedBatch, pack
from prism_trt.train.checkpoints import LATEST, RunState, find_state, save_state, stage_file
from prism_trt.train.held_back import hold_back
from prism_trt.train.initial import check_init, new_drafter
from prism_trt.train.losses import StepMetrics
from prism_trt.train.objective import Objective
from prism_trt.train.optimizer import StageOptimizer
from prism_trt.train.simulate import SimulatedAcceptance, VocabularyLoss, simulate_acceptance, vocabulary_loss
from prism_trt.train.stages import DataOrder, Stage, cut, learning_rate, stages
from prism_trt.train.step_map import step_map_of_difficulty
from prism_trt.train.vocabulary import choose_draft_vocab
from prism_trt.train.world import ALONE, World, restore_state, whole_moments, whole_weights


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


class Sequences(Protocol):
    """Training data by index: a `FeatureCache`, or something of its shape."""

    directory: Path
    greedy: np.ndarray

    @property
    def roots(self) -> np.ndarray: ...
    @property
    def data_sha256(self) -> str: ...
    def sequence(self, index: int) -> FeatureSequence: ...
    def token_counts(self, indices: np.ndarray, vocab_size: int) -> np.ndarray: ...


class Observer(Protocol):
    """Told about the progress of a run."""

    def started(self, planned: list[Stage], stage: int, update: int) -> None:
        """The run begins, or continues after `update` updates of `stage`."""

    def updated(self, report: UpdateReport) -> None:
        """An update was done."""

    def simulated(self, stage: Stage, update: int, acceptance: SimulatedAcceptance) -> None:
        """The acceptance length was simulated."""

    def mapped(self, step_map: tuple[int, ...], acceptance: SimulatedAcceptance) -> None:
        """A step map was chosen from measured acceptance."""


@dataclass(frozen=True)
class TrainingResult:
    """A trained drafter and what is known about its training."""

    drafter: Drafter
    rows: int
    seconds: float
    acceptance: SimulatedAcceptance | None
    """At the end, on the answers held back; None without such, or on other ranks than the first."""
    vocabulary: VocabularyLoss | None
    """Likewise; None also for a drafter of the whole vocabulary, or with a head of its own."""


class Trainer:
    """Trains one drafter on one feature cache. The result depends on configuration, data and thread count only."""

    def __init__(
        self,
        target: Target,
        cache: Sequences,
        config: TrainConfig,
        work: Path,
        init: Drafter | None = None,
        world: World = ALONE,
    ) -> None:
        """Prepare a run whose checkpoints live in `work`.

        Args:
            cache: opened for the features of `config`.
            init: drafter to start from; it keeps its shape and draft vocabulary. One of several modules is tuned only.
            world: the processes that share the run.

        Raises:
            PrismError: the cache leaves too little to train on, or `init` is not what the stages of `config` can train.
        """
        if init is not None:
            check_init(init.config, config)
        self._config = config
        self._cache = cache
        self._work = work
        self._world = world
        self._stages = stages(config)
        self.init_sha256 = init and weights_sha256(init)
        """Of `init` before training, which may change it."""
        self._signatures = [
            sha256_json([stage.signature, cache.data_sha256, target.fingerprint, self.init_sha256])
            for stage in self._stages
        ]
        self._compute = torch.bfloat16 if config.compute == "bfloat16" else torch.float32
        self._held_back, self._training = hold_back(cache.roots, cache.greedy, config)
        if init is None:
            counts = cache.token_counts(self._training, target.config.vocab_size)
            vocab = choose_draft_vocab(counts, config.draft_vocab_size, target.tokenizer.eos_token_ids)
            init = new_drafter(target, config, vocab)
        self._first = init
        with torch.no_grad():
            table = target.model.model.embed_tokens.weight
            self._embedding = table.to(world.device, self._compute)
            self._target_head = head = target.model.head_weight
            rows = head if init.draft_vocab is None else head[init.draft_vocab]
            self._head = rows.to(world.device, self._compute).contiguous()

    def run(self, observers: list[Observer]) -> TrainingResult:
        """Train, or continue from the last checkpoint in the work directory, to the end of the last stage.

        Raises:
            PrismError: the loss is no longer finite (the last checkpoint stays), or the work directory holds another
                run.
        """
        world = self._world
        state = find_state(self._work, self._stages, self._signatures)
        first, done = (state.stage, state.update) if state else (0, 0)
        rows, seconds = (state.rows, state.seconds) if state else (0, 0.0)
        drafter = self._first
        if state:
            drafter = _with_modules(drafter, self._stages[first].modules, tuple(state.step_map))
        for observer in observers:
            observer.started(self._stages, first, done)

        acceptance = None
        for stage in self._stages[first:]:
            if stage.number > first or state is None:
                done, state = 0, None
                drafter = _with_modules(drafter, stage.modules, self._step_map(drafter, stage, observers))
            objective = Objective(drafter, self._embedding, self._head, self._config)
            model = world.wrap(objective)
            optimizer = StageOptimizer(model, self._config)
            if state:
                restore_state(model, optimizer.parts, state.weights, state.moments)
            order = DataOrder(
                self._cache.roots[self._training], self._config.rows_per_update, self._config.seed, stage.number
            )
            for update in range(done, stage.updates):
                began = time.perf_counter()
                report = self._update(model, optimizer, stage, update, order.at(update))
                last = update + 1 == stage.updates
                seconds += time.perf_counter() - began
                rows += report.rows
                for observer in observers:
                    observer.updated(report)
                simulate = self.simulates and (last or (update + 1) % self._config.simulate_every == 0)
                save = last or (update + 1) % self._config.save_every == 0
                if not (simulate or save):
                    continue
                weights = whole_weights(model)
                moments = whole_moments(model, optimizer.parts) if save else {}
                if save and world.first:
                    current = RunState(
                        *(self._signatures[stage.number], stage.number, update + 1, rows, seconds),
                        *(list(drafter.config.step_map), weights, moments),
                    )
                    save_state(current, self._work / LATEST)
                    if last:
                        save_state(current, self._work / stage_file(stage))
                if simulate and world.first:
                    acceptance = self._simulate(self._plain(drafter, weights))
                    for observer in observers:
                        observer.simulated(stage, update + 1, acceptance)
                world.barrier()
            drafter = self._plain(drafter, whole_weights(model))
        if acceptance is None and self.simulates and world.first:
            acceptance = self._simulate(drafter)
        vocabulary = self._vocabulary_loss(drafter, acceptance)
        return TrainingResult(_as_kind(drafter, self._config).cpu().eval(), rows, seconds, acceptance, vocabulary)

    @property
    def simulates(self) -> bool:
        """Answers are held back, so that the acceptance length can be simulated."""
        return bool(len(self._held_back))

    def drafter_of(self, stage: Stage) -> Drafter:
        """The drafter that `stage` trains, before any training; a measured step map is not known yet."""
        return _with_modules(self._first, stage.modules, self._config.fixed_step_map)

    def probe(self, stage: Stage, updates: int = 2) -> float:
        """Rows per second of `stage`, measured on a few updates (after one more) whose result is thrown away."""
        drafter = copy.deepcopy(self.drafter_of(stage))
        model = self._world.wrap(Objective(drafter, self._embedding, self._head, self._config))
        optimizer = StageOptimizer(model, self._config)
        roots = self._cache.roots[self._training]
        order = DataOrder(roots, self._config.rows_per_update, self._config.seed, stage.number)
        reports = [self._update(model, optimizer, stage, update, order.at(update)) for update in range(updates + 1)]
        return sum(report.rows for report in reports[1:]) / sum(report.seconds for report in reports[1:])

    def _update(
        self, model: nn.Module, optimizer: StageOptimizer, stage: Stage, update: int, members: np.ndarray
    ) -> UpdateReport:
        began = time.perf_counter()
        config = self._config
        wanted = update % config.log_every == 0 or update + 1 == stage.updates
        metrics = StepMetrics.zeros(stage.steps) if wanted else None
        roots = self._cache.roots[self._training[members]]
        loss, distance = torch.zeros(()), torch.zeros(())
        parts = self._parts(roots)
        for number, part in enumerate(parts):
            # A rank without sequences takes part in the exchange of gradients with a loss of zero.
            chosen = members[part] if len(part) else members[:1]
            batch = pack([self._cache.sequence(int(self._training[member])) for member in chosen], roots.tolist())
            noise = None
            if stage.noise:
                seeds = [_noise_seed(config.seed, stage.number, update, int(member)) for member in chosen]
                noise = feature_noise(batch, stage.noise, seeds, self._compute).to(self._world.device)
            with self._world.accumulating(model, number + 1 == len(parts)):
                part_loss, part_distance = model(
                    batch.to(self._world.device), stage, noise, metrics if len(part) else None
                )
                share = 1.0 if len(part) else 0.0
                # Data parallelism averages gradients over ranks; they are to be added up.
                (share * self._world.size * part_loss).backward()
            loss += share * part_loss.detach().cpu()
            distance += share * part_distance.cpu()
        norm = optimizer.clip()
        if not math.isfinite(norm):
            raise self._diverged(stage, update)
        lr = learning_rate(update, stage, config)
        optimizer.step(lr)
        measured = None
        if metrics is not None:
            self._world.sum(loss, distance, metrics.cross_entropy, metrics.agreement, metrics.rows)
            rows = metrics.rows.clamp(min=1)
            measured = Measurement(
                loss=float(loss),
                hidden=float(distance),
                cross_entropy=tuple((metrics.cross_entropy / rows).tolist()),
                agreement=tuple((metrics.agreement / rows).tolist()),
            )
        seconds = time.perf_counter() - began
        return UpdateReport(stage, update + 1, int(roots.sum()), seconds, lr, norm, measured)

    def _diverged(self, stage: Stage, update: int) -> PrismError:
        """The error of a loss that is not finite in `update`, with advice that the next run can follow."""
        said = f"the loss is no longer finite at update {update + 1} of stage {stage.name}"
        # The first gradient of a stage shows what the one before has made of the weights.
        before = [earlier for earlier in self._stages[: stage.number] if earlier.updates]
        if not (update or before):
            return PrismError(f"{said}: lower the --*-weight options and --noise, or pass another --init or --cache")
        cause = stage if update else before[-1]
        lower = f"{said}: lower --{cause.name.replace('_', '-')}-lr"
        if any((self._work / stage_file(earlier)).is_file() for earlier in self._stages[: cause.number]):
            return PrismError(f"{lower} (the stages before it are kept in {self._work})")
        if not (self._work / LATEST).is_file():
            return PrismError(lower)
        # What is saved there belongs to the old learning rate.
        return PrismError(f"{lower} and pass another --work, with --cache {self._cache.directory} for the same answers")

    def _parts(self, roots: np.ndarray) -> list[np.ndarray]:
        """This rank's parts of an update, each for one forward pass."""
        size = self._world.size
        most = self._config.rows_per_pass
        passes = -(-int(roots.sum()) // (size * most)) if most else 1
        return cut(roots, size * passes)[self._world.rank :: size]

    def _step_map(self, drafter: Drafter, stage: Stage, observers: list[Observer]) -> tuple[int, ...]:
        """The step map of the drafter that `stage` trains."""
        if stage.modules == 1 or not self._config.measures_step_map:
            return self._config.fixed_step_map
        acceptance = self._simulate(drafter)
        # Tuning must reach every module; later steps use the last one.
        step_map = step_map_of_difficulty(acceptance.top1[: stage.steps], stage.modules)
        for observer in observers:
            observer.mapped(step_map, acceptance)
        return step_map

    def _plain(self, drafter: Drafter, weights: dict[str, Tensor]) -> Drafter:
        """`drafter` with the trained weights of an `Objective`, on this rank's device and never sharded."""
        copy = Drafter(drafter.config, drafter.draft_vocab, len(self._embedding))
        copy.load_state_dict({name.removeprefix("drafter."): value for name, value in weights.items()})
        return copy.to(self._world.device)

    def _simulate(self, drafter: Drafter) -> SimulatedAcceptance:
        head = self._head if drafter.lm_head is None else drafter.lm_head.weight
        drafter = drafter.to(self._world.device)
        batches = self._held_back_batches()
        return simulate_acceptance(drafter, self._embedding, head, batches, self._compute, teacher_head=self._head)

    def _vocabulary_loss(self, drafter: Drafter, acceptance: SimulatedAcceptance | None) -> VocabularyLoss | None:
        """None on ranks that did not simulate `acceptance`, too."""
        if acceptance is None or not acceptance.roots or drafter.draft_vocab is None or drafter.lm_head is not None:
            return None
        target_head = self._target_head.to(self._world.device, self._compute)
        batches = list(self._held_back_batches())
        return vocabulary_loss(drafter, self._embedding, target_head, batches, self._compute, acceptance)

    def _held_back_batches(self) -> Iterator[PackedBatch]:
        """Batches of at most 8 sequences, because all draft steps of a batch are held at once."""
        for first in range(0, len(self._held_back), 8):
            members = self._held_back[first : first + 8]
            yield pack([self._cache.sequence(int(index)) for index in members]).to(self._world.device)


def _with_modules(drafter: Drafter, modules: int, step_map: tuple[int, ...]) -> Drafter:
    """`drafter` with `modules` copies of its one module, unless it has several already."""
    if modules == 1 or drafter.config.num_modules > 1:
        return drafter
    return copy_modules(drafter, modules, step_map)


def _as_kind(drafter: Drafter, config: TrainConfig) -> Drafter:
    """`drafter` labelled as what it was trained to be."""
    drafter.config = DrafterConfig.model_validate(drafter.config.model_dump() | {"kind": config.kind})
    return drafter


def _noise_seed(seed: int, stage: int, update: int, sequence: int) -> int:
    return int(np.random.SeedSequence((seed, stage, update, sequence)).generate_state(1, np.uint64)[0] >> np.uint64(1))
