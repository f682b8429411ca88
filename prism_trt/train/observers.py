"""What a training run shows: a progress line, TensorBoard scalars."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from prism_trt.config import TrainConfig
from prism_trt.errors import PrismError
from prism_trt.progress import Reporter
from prism_trt.storage import writing
from prism_trt.train.loop import Measurement, UpdateReport
from prism_trt.train.simulate import STEPS, SimulatedAcceptance
from prism_trt.train.stages import Stage

_SMOOTHING = 0.05
_OVERFITTING = 0.15
"""Difference of accuracies that is worth a warning; both are shares of first choices that are the target's."""
_NOT_MEASURED = f"not measured, because no answer held back has {STEPS} tokens to draft"


class ProgressObserver:
    """Keeps the progress line current and prints each simulated acceptance length."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._planned: list[Stage] = []
        self._rate = 0.0
        self._measured: Measurement | None = None

    def started(self, planned: list[Stage], stage: int, update: int) -> None:
        self._planned = planned
        self._reporter.advance(sum(earlier.updates for earlier in planned[:stage]) + update)
        if stage or update:
            print(f"continuing stage {planned[stage].name} after update {update}", file=sys.stderr, flush=True)

    def updated(self, report: UpdateReport) -> None:
        rate = report.rows / report.seconds
        self._rate += (_SMOOTHING if self._rate else 1.0) * (rate - self._rate)
        self._measured = report.measured or self._measured
        self._reporter.describe(self._line(report))
        self._reporter.advance()

    def simulated(self, stage: Stage, update: int, acceptance: SimulatedAcceptance) -> None:
        steps = " ".join(f"{share:.3f}" for share in acceptance.top1)
        length = f"{acceptance.chain:.3f} (top-4 {acceptance.chain_top4:.3f}), right per step {steps}"
        print(
            f"{stage.name} {update}/{stage.updates}: simulated acceptance length "
            f"{length if acceptance.roots else _NOT_MEASURED}",
            file=sys.stderr,
            flush=True,
        )

    def mapped(self, step_map: tuple[int, ...], acceptance: SimulatedAcceptance) -> None:
        steps = ", ".join(
            f"step {step} is right on {share:.1%}: module {step_map[min(step, len(step_map) - 1)]}"
            for step, share in enumerate(acceptance.top1)
        )
        print(f"step map by difficulty: {steps}", file=sys.stderr, flush=True)

    def _line(self, report: UpdateReport) -> str:
        work = report.rows / self._rate
        later = sum(stage.updates * stage.steps for stage in self._planned[report.stage.number + 1 :])
        left = work * (report.stage.updates - report.update + later / report.stage.steps)
        parts = [report.stage.name, f"{self._rate:,.0f} rows/s", f"about {_clock(left)} left"]
        if self._measured is not None:
            first = f"top-1 {self._measured.agreement[0]:.3f}"
            parts[1:1] = [f"loss {self._measured.loss:.4f}", f"CE {self._measured.cross_entropy[0]:.3f}", first]
        return ", ".join(parts)


class OverfittingObserver:
    """Says once per stage when the drafter knows its training data much better than the answers held back.

    High training accuracy next to a low acceptance length is the commonest complaint about trained drafters; this is
    its commonest cause.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._accuracy: list[float] = []
        self._warned = ""

    def started(self, planned: list[Stage], stage: int, update: int) -> None:
        self._accuracy = []

    def updated(self, report: UpdateReport) -> None:
        if report.measured is not None:
            self._accuracy.append(report.measured.agreement[0])

    def simulated(self, stage: Stage, update: int, acceptance: SimulatedAcceptance) -> None:
        recent, self._accuracy = self._accuracy, []
        held_back = acceptance.agreement
        if not recent or held_back is None or self._warned == stage.name:
            return
        trained = sum(recent) / len(recent)
        if trained - held_back > _OVERFITTING:
            self._warned = stage.name
            length = f"{acceptance.chain:.2f}" if acceptance.roots else "not measured"
            self._say(
                f"warning: the drafter chooses the target's token in {trained:.0%} of its training data but in "
                f"{held_back:.0%} of the answers held back (simulated acceptance length {length}): more data, or fewer "
                "updates, would serve it better"
            )

    def mapped(self, step_map: tuple[int, ...], acceptance: SimulatedAcceptance) -> None:
        """Nothing to say."""


class TensorBoardObserver:
    """Writes TensorBoard scalars; a continued run overwrites what the interrupted one logged past its checkpoint."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: SummaryWriter | None = None
        self._offsets: list[int] = []

    def started(self, planned: list[Stage], stage: int, update: int) -> None:
        self._offsets = [sum(earlier.updates for earlier in planned[:number]) for number in range(len(planned))]
        with writing(self._directory):
            self._writer = SummaryWriter(str(self._directory), purge_step=self._offsets[stage] + update + 1)

    def updated(self, report: UpdateReport) -> None:
        if report.measured is None:
            return
        step = self._offsets[report.stage.number] + report.update
        self._scalars(
            step,
            {
                "train/loss": report.measured.loss,
                "train/hidden_loss": report.measured.hidden,
                "train/learning_rate": report.lr,
                "train/gradient_norm": report.gradient_norm,
                "train/rows_per_second": report.rows / report.seconds,
            },
        )
        for k, (entropy, agreement) in enumerate(
            zip(report.measured.cross_entropy, report.measured.agreement, strict=True)
        ):
            self._scalars(step, {f"train/cross_entropy/step_{k}": entropy, f"train/top1/step_{k}": agreement})

    def simulated(self, stage: Stage, update: int, acceptance: SimulatedAcceptance) -> None:
        if not acceptance.roots:
            return
        step = self._offsets[stage.number] + update
        self._scalars(
            step,
            {
                "simulated/acceptance_length": acceptance.chain,
                "simulated/acceptance_length_top4": acceptance.chain_top4,
            },
        )
        for k, share in enumerate(acceptance.top1):
            self._scalars(step, {f"simulated/top1/step_{k}": share})

    def mapped(self, step_map: tuple[int, ...], acceptance: SimulatedAcceptance) -> None:
        for k, module in enumerate(step_map):
            self._scalars(self._offsets[-1], {f"step_map/step_{k}": float(module)})

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            with writing(self._directory):
                self._writer.close()

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        assert self._writer is not None
        with writing(self._directory):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step, walltime=time.time())


@contextmanager
def quiet_writer() -> Iterator[None]:
    """Print no traceback of TensorBoard's thread, whose error the next call of its writer raises."""
    before = threading.excepthook

    def hook(error: threading.ExceptHookArgs) -> None:
        if not type(error.thread).__module__.startswith("tensorboard."):
            before(error)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _clock(seconds: float) -> str:
    minutes = int(seconds) // 60
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {int(seconds) % 60:02d} s"


def require_wandb() -> None:
    """Require what `start_wandb` imports.

    Raises:
        PrismError: the package is not installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise PrismError("--wandb needs the package wandb: install it with pip install wandb")


@contextmanager
def start_wandb(project: str, work: Path, logs: Path, training: TrainConfig) -> Iterator[None]:
    """A Weights & Biases run in `work` that receives the scalars which TensorBoard writes to `logs`.

    Raises:
        PrismError: the package is not installed.
    """
    require_wandb()
    import wandb

    wandb.tensorboard.patch(root_logdir=str(logs))
    with wandb.init(project=project, dir=str(work), config=training.model_dump()):
        yield
