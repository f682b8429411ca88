"""`python -m prism_trt.bench.sweep`: from which batch size on does speculation lose, and does the planner ever?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure

from prism_trt.bench.batches import PLANNER, SweepPoint, SweepResult, SweepSettings, count_runs, run_sweep
from prism_trt.bench.methods import engine_info
from prism_trt.bench.prompts import PROMPTS
from prism_trt.bench.questions import load_questions
from prism_trt.bench.report import estimate_text, markdown_table
from prism_trt.bench.results import VANILLA, write_json
from prism_trt.build.latency import request_counts
from prism_trt.cli import run
from prism_trt.config import TreeShape, parse
from prism_trt.engines.loading import load_engine, load_engine_tokenizer, load_planner
from prism_trt.manifest import atomic_file
from prism_trt.plots import save_figure
from prism_trt.progress import progress


def app() -> typer.Typer:
    """The `bench.sweep` command."""
    command = typer.Typer(add_completion=False, help="Throughput by batch size: vanilla, fixed trees, planner.")
    command.command()(sweep)
    return command


def sweep(
    engine: Annotated[Path, typer.Option(help="Engine directory, built with a drafter and --slots.")],
    json_path: Annotated[Path, typer.Option("--json", help="Where the result is written.")],
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size; may be repeated. Default: 1, 2, 4, ... all slots.")
    ] = None,
    tree: Annotated[
        list[str] | None, typer.Option(help="Fixed tree SIZE/WIDTH/DEPTH; may be repeated. Default: the engine's.")
    ] = None,
    questions: Annotated[
        list[Path] | None, typer.Option(help="question.jsonl file; may be repeated. Default: some own prompts.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer, in tokens.")] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Blocks per batch size.")] = 4,
    threads: Annotated[int | None, typer.Option(min=1, help="Engine threads. Default: the engine's choice.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Where a PNG plot is written.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Where a Markdown table is written.")] = None,
) -> None:
    """Run all modes in turn at every batch size. Exits with 1 when an output differs from vanilla's."""
    loaded = load_engine(engine, threads=threads)
    tokenizer = load_engine_tokenizer(engine)
    texts = [question.turns[0] for question in load_questions(questions)] if questions else list(PROMPTS)
    prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    sizes = batch or request_counts(loaded.limits.slots)
    settings = parse(
        SweepSettings,
        {
            "batches": tuple(sorted(set(sizes))),
            "trees": tuple(TreeShape.parse(text) for text in tree or ()) or (loaded.default_tree,),
            "max_new_tokens": max_new_tokens,
            "repeats": repeats,
            "seed": seed,
        },
        "sweep settings",
    )
    planner = load_planner(engine, loaded)
    with progress("Decoding", total=count_runs(settings)) as bar:
        result = run_sweep(
            loaded,
            engine_info(engine, threads),
            planner,
            prompts,
            tuple(tokenizer.eos_token_ids),
            settings,
            lambda: bar.advance(1),
        )
    write_json(result, json_path)
    if plot is not None:
        save_figure(sweep_figure(result), plot)
    if markdown is not None:
        with atomic_file(markdown) as temporary:
            temporary.write_text(sweep_markdown(result), encoding="utf-8")
    typer.echo(sweep_table(result))
    if not result.identical:
        raise typer.Exit(1)


def sweep_table(result: SweepResult) -> str:
    """A Markdown table with one row per batch size."""
    trees = [str(tree) for tree in result.settings.trees]
    header = ["batch", "vanilla tok/s", *(f"{tree} / vanilla" for tree in trees)]
    header += ["planner / vanilla", "planner / best tree", "planner's rounds"]
    lines = []
    for batch in result.settings.batches:
        planned = result.point(batch, PLANNER)
        lines.append(
            [
                str(batch),
                f"{result.point(batch, VANILLA).tokens_per_second:.0f}",
                *(estimate_text(result.point(batch, tree).to_vanilla) for tree in trees),
                estimate_text(planned.to_vanilla),
                estimate_text(planned.to_best_tree),
                _shares_text(planned),
            ]
        )
    return markdown_table(header, lines)


def sweep_markdown(result: SweepResult) -> str:
    """The table with the settings that produced it."""
    settings, band = result.settings, result.bandwidth_gb_s
    crossings = ", ".join(
        f"{tree} {'never' if batch is None else f'at batch {batch:.1f}'}" for tree, batch in result.crossovers.items()
    )
    return (
        f"Ratios of tokens per second with 95 % intervals over {settings.repeats} blocks; modes in turn on the same "
        f"requests, greedy, at most {settings.max_new_tokens} new tokens, prefill of joining requests included.\n\n"
        f"Machine: {result.environment.processor}, {result.engine.threads} threads; memory bandwidth {band.median:.0f} "
        f"GB/s (from {band.low:.0f} to {band.high:.0f}). Outputs identical to vanilla's: "
        f"{'yes' if result.identical else 'NO'}. Slower than vanilla: {crossings}.\n\n{sweep_table(result)}\n"
    )


def sweep_figure(result: SweepResult) -> Figure:
    """Ratio to vanilla over the batch size, one line per mode; each tree's crossover is marked."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for mode in [*map(str, result.settings.trees), PLANNER]:
        known = [
            (batch, ratio)
            for batch in result.settings.batches
            if (ratio := result.point(batch, mode).to_vanilla) is not None
        ]
        values = [ratio.value for _, ratio in known]
        errors = ([r.value - r.low for _, r in known], [r.high - r.value for _, r in known])
        (line, *_) = axes.errorbar(
            [batch for batch, _ in known],
            values,
            yerr=errors,
            fmt="o-",
            capsize=3,
            linewidth=2.5 if mode == PLANNER else 1.2,
            label=mode,
        )
        crossing = result.crossovers.get(mode)
        if crossing is not None:
            axes.axvline(crossing, color=line.get_color(), linestyle=":", linewidth=1)
            axes.annotate(f"{crossing:.1f}", (crossing, 1.0), textcoords="offset points", xytext=(4, 4))
    axes.axhline(1.0, color="grey", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(result.settings.batches, [str(batch) for batch in result.settings.batches])
    axes.set(xlabel="requests at a time", ylabel="tokens per second, relative to vanilla")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _shares_text(point: SweepPoint) -> str:
    """The most frequent plans with their share of the rounds."""
    return ", ".join(f"{plan} {share:.0%}" for plan, share in list(point.plans.items())[:3])


if __name__ == "__main__":
    run(app())
