"""Markdown and console tables of a bench result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prism_trt.bench.results import OVERALL, BenchResult, Estimate, Figures, Summary
from prism_trt.manifest import atomic_file

HEADER = (
    "method",
    "set",
    "tree",
    "T",
    "questions",
    "skipped",
    "vanilla tok/s",
    "tok/s",
    "speed-up [95 % CI]",
    "end to end",
    "AL pooled [95 % CI]",
    "AL mean [95 % CI]",
    "mean of set ALs [95 % CI]",
    "accepted per draft step",
    "identical",
)
COMPARISON_HEADER = ("method", "set", "tree", "T", "AL pooled", "mean of set ALs", "tok/s")
SEEDS_HEADER = ("method", "seed", "tree", "T", *HEADER[HEADER.index("tok/s") :])


def rows(result: BenchResult) -> list[tuple[str, ...]]:
    """One row of `HEADER` per summary."""
    return [
        (
            *_labels(summary),
            str(summary.questions),
            str(summary.skipped),
            number_text(summary.vanilla.decode_tps, 1),
            *_figures(summary, summary.set == OVERALL),
        )
        for summary in result.summaries
    ]


def comparison_rows(result: BenchResult) -> list[tuple[str, ...]]:
    """One row of `COMPARISON_HEADER` per summary of a method other than the reference."""
    return [
        (*_labels(summary), *map(estimate_text, (ratios.al_pooled, ratios.al_set_mean, ratios.decode_tps)))
        for summary in result.summaries
        if (ratios := summary.to_reference) is not None
    ]


def seed_rows(result: BenchResult) -> list[tuple[str, ...]]:
    """One row of `SEEDS_HEADER` per training seed of a method that has several, over all sets."""
    return [
        (summary.method, str(number), *_labels(summary)[2:], *_figures(figures, True))
        for summary in result.summaries
        if summary.set == OVERALL
        for number, figures in enumerate(summary.training_seeds)
    ]


def markdown(result: BenchResult) -> str:
    """The result as Markdown tables with the settings that produced it."""
    settings, band = result.settings, result.bandwidth_gb_s
    temperatures = ", ".join(f"{temperature:g}" for temperature in settings.temperatures)
    infos = [info for method in result.methods for info in method.engines]
    engines = [" ".join(filter(None, (info.profile, info.runtime, info.isa, info.dtype))) for info in infos]
    if settings.timed:
        manner = (
            "Batch 1, modes interleaved question by question; tok/s are pooled and leave out the prefill, except for "
            "the end-to-end ratio."
        )
    else:
        manner = f"{settings.batch} question(s) at a time, for acceptance only: speed was not measured."
        if settings.replay:
            manner += " Drafts followed vanilla's answers and were not verified by the target."
    blocks = [
        f"{manner} At most {settings.max_new_tokens} new tokens, temperature {temperatures}, {settings.repeats} "
        "repeat(s).",
        f"Machine: {result.environment.processor}, {infos[0].threads} threads; memory bandwidth during the "
        f"run {band.median:.0f} GB/s (from {band.low:.0f} to {band.high:.0f}). Engines: "
        f"{', '.join(dict.fromkeys(engines))}; torch {result.environment.torch}.",
        markdown_table(HEADER, rows(result)),
    ]
    if compared := comparison_rows(result):
        blocks += [
            f"Ratios to {settings.reference} on the same questions, with 95 % intervals:",
            markdown_table(COMPARISON_HEADER, compared),
        ]
    if seeds := seed_rows(result):
        blocks += [
            "Each training seed over all sets; its intervals are over questions only:",
            markdown_table(SEEDS_HEADER, seeds),
        ]
    return "\n\n".join(blocks) + "\n"


def write_markdown(result: BenchResult, path: Path) -> None:
    """Write `markdown(result)`, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(markdown(result), encoding="utf-8")


def console_table(result: BenchResult) -> Table:
    """What fits a terminal: the columns whose values differ or were measured."""
    columns: list[tuple[str, list[str]]] = [
        (name, [_labels(summary)[place] for summary in result.summaries])
        for place, name in enumerate(("method", "set", "tree", "T"))
    ]
    constant = [f"{name} {values[0]}" for name, values in columns if name != "set" and len(set(values)) == 1]
    columns = [(name, values) for name, values in columns if name == "set" or len(set(values)) > 1]
    if result.settings.timed:
        columns += [
            ("vanilla tok/s", [number_text(summary.vanilla.decode_tps, 1) for summary in result.summaries]),
            ("tok/s", [number_text(summary.rates.decode_tps, 1) for summary in result.summaries]),
            ("ratio", [number_text(_value(summary.speedup), 2) for summary in result.summaries]),
        ]
    columns += [
        ("AL", [number_text(_value(summary.al_pooled), 2) for summary in result.summaries]),
        ("accepted, %", [_percentages(summary.step_acceptance) for summary in result.summaries]),
        ("same", [_yes_no(summary.identical) for summary in result.summaries]),
    ]
    title = ", ".join(["Drafting against vanilla decoding", *constant])
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for name, _ in columns:
        left = name in ("method", "set", "tree")
        table.add_column(name, justify="left" if left else "right", no_wrap=name == "accepted, %")
    for summary, cells in zip(result.summaries, zip(*(values for _, values in columns), strict=True), strict=True):
        table.add_row(*cells, style="bold" if summary.set == OVERALL else None)
    return table


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(map(_line, [header, ["---"] * len(header), *lines]))


def estimate_text(estimate: Estimate | None) -> str:
    """``value [low, high]`` with two decimals; a dash when nothing was measured."""
    return "-" if estimate is None else f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def number_text(value: float | None, digits: int) -> str:
    """`value` with so many decimals; a dash when nothing was measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def _labels(summary: Summary) -> tuple[str, str, str, str]:
    return summary.method, summary.set, summary.tree, f"{summary.temperature:g}"


def _figures(figures: Figures, several_sets: bool) -> tuple[str, ...]:
    return (
        number_text(figures.rates.decode_tps, 1),
        estimate_text(figures.speedup),
        number_text(_value(figures.end_to_end_speedup), 2),
        estimate_text(figures.al_pooled),
        estimate_text(figures.al_question_mean),
        estimate_text(figures.al_set_mean if several_sets else None),
        " ".join(number_text(share, 2) for share in figures.step_acceptance),
        _yes_no(figures.identical),
    )


def _percentages(shares: Sequence[float | None]) -> str:
    return " ".join(number_text(None if share is None else 100 * share, 0) for share in shares)


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _yes_no(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "NO"
