"""Command line of the quickstart."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import platformdirs
import typer
from rich.console import Console
from rich.text import Text

from prism_trt.bench.prompts import PROMPTS
from prism_trt.bench.results import write_json
from prism_trt.deploy.server import check_port, find_triton
from prism_trt.engines.manifest import read_engine_manifest
from prism_trt.interrupts import outside_imports
from prism_trt.progress import progress
from prism_trt.quickstart.artifacts import (
    Artifact,
    prepare_drafter,
    prepare_engine,
    prepare_repository,
    shipped_drafter,
)
from prism_trt.quickstart.measuring import measure
from prism_trt.quickstart.report import QuickstartResult, quickstart_result, result_table, write_figure
from prism_trt.quickstart.serving import ServedAnswer, server_for, stream_answer
from prism_trt.target.smollm2 import find_smollm2

_PROMPT = "Write a Python function that checks whether a word is a palindrome."


def app() -> typer.Typer:
    """The `quickstart` command."""
    command = typer.Typer(add_completion=False, help="Train, build, serve and measure on this machine.")
    command.command()(quickstart)
    return command


def quickstart(
    json_path: Annotated[Path | None, typer.Option("--json", help="Figures.  [default: WORK/quickstart.json]")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot.  [default: WORK/quickstart.png]")] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Train a small drafter instead of using the shipped one.")
    ] = False,
    work: Annotated[Path | None, typer.Option(help="Where artifacts are kept.  [default: the user's cache]")] = None,
    prompt: Annotated[str, typer.Option(help="What the served model is asked.")] = _PROMPT,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.  [default: all processors]")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port of the server.  [default: a free one]")] = None,
) -> None:
    """Get SmolLM2-135M-Instruct and a drafter, build an engine, serve it with Triton, stream an answer, and measure.

    Everything made is kept, so a second run starts at once. Interrupt at any time.
    """
    _interrupt_on_termination()
    find_triton()
    if port is not None:
        check_port(port, "--port")
    work = Path(platformdirs.user_cache_dir("prism_trt")) / "quickstart" if work is None else work
    json_path, plot = json_path or work / "quickstart.json", plot or work / "quickstart.png"
    console = Console(highlight=False, soft_wrap=True)

    _step(console, 1, "Target", "SmolLM2-135M-Instruct")
    with progress("Finding SmolLM2-135M-Instruct"):
        target = find_smollm2()
    drafter = _drafter(console, target, work, train)
    engine = _engine(console, target, drafter, work)
    _serve(console, prepare_repository(engine, work, threads).path, prompt, port)

    _step(console, 5, "Measure", f"{len(PROMPTS)} other prompts, vanilla and PRISM in turns, in this process")
    with progress("Measuring", total=len(PROMPTS)) as bar:
        result = measure(engine, threads, bar.advance)
    figures = quickstart_result(result)
    write_json(figures, json_path)
    write_figure(figures, plot)
    console.print()
    console.print(result_table(result))
    _explain(console, figures, result.bandwidth_gb_s.median)
    console.print(f"\nFigures: {json_path}\nPlot:    {plot}\nEngine:  {engine}")
    if not figures.identical:
        raise typer.Exit(1)


def _interrupt_on_termination() -> None:
    """Make SIGTERM and a closed terminal end the run like Ctrl-C, so that the same clean-up happens."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, outside_imports(signal.default_int_handler))


def _step(console: Console, number: int, name: str, text: str) -> None:
    console.print(f"[bold cyan]{number}/5[/] [bold]{name}[/]: {text}")


def _drafter(console: Console, target: Path, work: Path, train: bool) -> Path:
    shipped = shipped_drafter()
    if shipped is not None and not train:
        _step(console, 2, "Drafter", "a PRISM drafter trained for this target comes with the package")
        return shipped
    why = "" if train else "none comes with this package, so "
    _step(console, 2, "Drafter", f"{why}a small one is trained on the target's own answers (a few minutes, once)")
    trained = prepare_drafter(target, work)
    console.print(f"    {_kept(trained, 'trained')} {trained.path}")
    return trained.path


def _engine(console: Console, target: Path, drafter: Path, work: Path) -> Path:
    _step(console, 3, "Engine", "for this processor")
    remarks: list[str] = []
    with progress("Building the engine"):
        engine = prepare_engine(target, drafter, work, remarks.append)
    for remark in remarks:
        console.print(f"    {remark}")
    manifest = read_engine_manifest(engine.path)
    kind = f"C++ {manifest.isa}" if manifest.runtime == "cpp" else manifest.runtime
    console.print(
        f"    {_kept(engine, 'built')} {engine.path} ({kind}, {manifest.dtype}, tree {manifest.default_tree})"
    )
    return engine.path


def _serve(console: Console, repository: Path, prompt: str, port: int | None) -> None:
    _step(console, 4, "Serve", "Triton Inference Server, streaming over gRPC")
    server = server_for(repository, port)
    try:
        with progress("Starting the server"):
            server.start()
        console.print(f"    listening on {server.grpc_url}\n")
        console.print(Text(f"    > {prompt}", style="italic"))
        answer = stream_answer(server, prompt, lambda text: console.print(Text(text, style="green"), end=""))
        console.print("\n")
        console.print(f"    {_timing(answer)}")
    finally:
        server.stop()


def _timing(answer: ServedAnswer) -> str:
    rate = answer.tokens / answer.seconds
    return (
        f"{answer.tokens} tokens in {answer.seconds:.2f} s ({rate:.0f} per second), the first after "
        f"{1000 * answer.first_seconds:.0f} ms; the server stops now, so that measuring has the processor to itself"
    )


def _explain(console: Console, figures: QuickstartResult, bandwidth: float) -> None:
    same = "the same tokens" if figures.identical else "DIFFERENT tokens (please report this)"
    console.print(
        f"PRISM gave {same} {figures.speedup:.2f} times as fast: each pass of the target yields "
        f"{figures.acceptance_length:.2f} tokens instead of one. Memory bandwidth during the run: {bandwidth:.0f} GB/s."
    )


def _kept(artifact: Artifact, made: str) -> str:
    return "reusing" if artifact.reused else f"{made}:"
