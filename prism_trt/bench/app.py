"""Command line of the bench."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prism_trt.bench.figures import write_plots
from prism_trt.bench.journal import Journal, journal_head, journal_path
from prism_trt.bench.methods import default_tree, load_methods, read_methods
from prism_trt.bench.questions import load_questions
from prism_trt.bench.report import console_table, write_markdown
from prism_trt.bench.results import BenchSettings, write_json
from prism_trt.bench.runner import count_answers, environment, run_bench
from prism_trt.config import TreeShape, parse
from prism_trt.engines.loading import load_engine_tokenizer
from prism_trt.progress import Reporter, progress
from prism_trt.storage import writing

_FILE_WIDTH = 160
"""Columns of a table that goes to a file or a pipe, which have no width: numbers must not be cut."""


def app() -> typer.Typer:
    """The `bench` command."""
    command = typer.Typer(add_completion=False, help="Measure acceptance length and speed-up of one or more engines.")
    command.command()(bench)
    return command


def bench(
    engine: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]DIR",
            help="Engine directory and the name of its method; may be repeated, and the same name again is another "
            "training seed of that method. Default name: the drafter's kind.",
        ),
    ],
    questions: Annotated[list[Path], typer.Option(help="question.jsonl file; several may follow.")],
    json_path: Annotated[
        Path, typer.Option("--json", help="Where the result is written; an interrupted run continues from there.")
    ],
    more_questions: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Further question files.", show_default=False)
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="NAME", help="Method that the others are compared with. Default: none.")
    ] = None,
    per_set: Annotated[int | None, typer.Option(min=1, help="Questions taken of each file.")] = 10,
    skip_first: Annotated[int, typer.Option(min=0, help="Questions skipped at the start of each file.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer, in tokens.")] = 128,
    tree: Annotated[
        list[str] | None,
        typer.Option(
            help="Draft tree SIZE/WIDTH/DEPTH; may be repeated. The paper's are 60/10/6 and 16/4/6. Default: the "
            "engines' own."
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0.0, help="0 is greedy; may be repeated. Default: 0.")
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Questions answered at a time; above 1, only acceptance is measured.")
    ] = 1,
    replay: Annotated[
        bool,
        typer.Option(
            "--replay",
            help="Draft along vanilla's greedy answers without verification passes: only acceptance is measured, in a "
            "fraction of the time.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling and of the bootstrap.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Answers to each question in each mode.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Engine threads. Default: the engine's choice.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Directory for PNG plots.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Where Markdown tables are written.")] = None,
) -> None:
    """Answer questions without drafting and with every engine's drafter, and compare.

    Interrupt at any time; the same command continues. Exits with 1 when greedy outputs differ from those without
    drafting, after writing the result.
    """
    for path in filter(None, (json_path, markdown, plots and plots / "plot.png")):
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    chosen = load_questions([*questions, *(more_questions or [])], per_set, skip_first)
    shapes = tuple(TreeShape.parse(text) for text in tree or ())
    paths = read_methods(engine)
    methods = load_methods(paths, threads, slots=batch if batch > 1 else None)
    settings = parse(
        BenchSettings,
        {
            "trees": tuple(dict.fromkeys(shapes)) or (default_tree(methods),),
            "temperatures": tuple(dict.fromkeys(temperature or (0.0,))),
            "max_new_tokens": max_new_tokens,
            "batch": batch,
            "replay": replay,
            "seed": seed,
            "repeats": repeats,
            "reference": reference,
        },
        "bench settings",
    )
    tokenizer = load_engine_tokenizer(next(iter(paths.values()))[0])
    head = journal_head(settings, [method.info for method in methods], environment(), chosen)
    journal = Journal(journal_path(json_path), head)
    left = [question for index, question in enumerate(chosen) if index not in journal.finished]
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    if journal.finished:
        console.print(f"{len(journal.finished)} of {len(chosen)} questions were answered earlier")
    total = count_answers(methods, left, settings)
    with progress("Answering", total=total) as bar:
        result = run_bench(
            methods, tokenizer, chosen, settings, journal.finished, journal.add, _with_time_left(bar, total)
        )
    write_json(result, json_path)
    journal.remove()
    if markdown is not None:
        write_markdown(result, markdown)
    if plots is not None:
        write_plots(result, plots)
    console.print(console_table(result))
    band = result.bandwidth_gb_s
    console.print(f"memory bandwidth {band.median:.0f} GB/s ({band.low:.0f} to {band.high:.0f}); result in {json_path}")
    if result.identical is False:
        raise typer.Exit(1)


def _with_time_left(bar: Reporter, total: int) -> Callable[[int], None]:
    """Advance `bar`, and show how long the rest takes when it goes on like this."""
    start, done = time.monotonic(), 0

    def advance(answers: int) -> None:
        nonlocal done
        done += answers
        rest = (total - done) * (time.monotonic() - start) / done
        bar.describe(f"Answering, {timedelta(seconds=round(rest))} left")
        bar.advance(answers)

    return advance
