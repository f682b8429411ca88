"""Command line of the bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prism_trt.bench.figures import write_plots
from prism_trt.bench.questions import load_questions
from prism_trt.bench.report import console_table, write_markdown
from prism_trt.bench.results import BenchSettings, EngineInfo, write_json
from prism_trt.bench.runner import run_bench
from prism_trt.config import TreeShape, parse
from prism_trt.engines.loading import default_threads, load_engine, load_engine_tokenizer
from prism_trt.engines.manifest import read_engine_manifest
from prism_trt.engines.protocol import Engine
from prism_trt.progress import progress


def app() -> typer.Typer:
    """The `bench` command."""
    command = typer.Typer(add_completion=False, help="Measure an engine's acceptance length and speed-up.")
    command.command()(bench)
    return command


def engine_info(engine: Path, threads: int | None) -> EngineInfo:
    """Identify an engine directory by its manifest, loaded with `threads` (None: the default)."""
    manifest = read_engine_manifest(engine)
    return EngineInfo(
        profile=manifest.profile,
        runtime=manifest.runtime,
        dtype=manifest.dtype,
        isa=manifest.isa,
        target_fingerprint=manifest.target_fingerprint,
        drafter_sha256=manifest.drafter_sha256,
        threads=threads or default_threads(),
    )


def default_tree(engine: Engine) -> TreeShape:
    """The tree the engine was planned for, or the paper's evaluation tree when it has no plan."""
    tree: TreeShape = getattr(engine, "default_tree", TreeShape())
    return tree


def bench(
    engine: Annotated[Path, typer.Option(help="Engine directory, as written by the build command.")],
    questions: Annotated[list[Path], typer.Option(help="question.jsonl file; several may follow.")],
    json_path: Annotated[Path, typer.Option("--json", help="Where the result is written.")],
    more_questions: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Further question files.", show_default=False)
    ] = None,
    per_set: Annotated[int | None, typer.Option(min=1, help="Questions taken of each file.")] = 10,
    skip_first: Annotated[int, typer.Option(min=0, help="Questions skipped at the start of each file.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer, in tokens.")] = 128,
    tree: Annotated[
        list[str] | None,
        typer.Option(help="Draft tree SIZE/WIDTH/DEPTH; may be repeated. Default: the engine's own."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling and of the bootstrap.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each question in each mode.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Engine threads. Default: the engine's choice.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Directory for PNG plots.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Where a Markdown table is written.")] = None,
) -> None:
    """Answer questions with and without drafting, interleaved, and compare.

    Exits with 1 when greedy outputs differ, after writing the result.
    """
    chosen = load_questions([*questions, *(more_questions or [])], per_set, skip_first)
    shapes = tuple(TreeShape.parse(text) for text in tree or ())
    loaded = load_engine(engine, threads=threads)
    settings = parse(
        BenchSettings,
        {
            "trees": shapes or (default_tree(loaded),),
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "repeats": repeats,
        },
        "bench settings",
    )
    tokenizer, info = load_engine_tokenizer(engine), engine_info(engine, threads)
    with progress("Answering questions", total=len(chosen)) as bar:
        result = run_bench(loaded, tokenizer, chosen, settings, info, lambda record: bar.advance(1))
    write_json(result, json_path)
    if markdown is not None:
        write_markdown(result, markdown)
    if plots is not None:
        write_plots(result, plots)
    console = Console()
    console.print(console_table(result))
    band = result.bandwidth_gb_s
    console.print(
        f"memory bandwidth {band.median:.0f} GB/s ({band.low:.0f} to {band.high:.0f}); result in {json_path}",
        highlight=False,
        soft_wrap=True,
    )
    if result.identical is False:
        raise typer.Exit(1)
