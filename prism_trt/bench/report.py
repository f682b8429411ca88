"""Markdown and console tables of a bench result."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from prism_trt.bench.results import OVERALL, BenchResult, Interval, Summary
from prism_trt.manifest import atomic_file

HEADER = (
    "set",
    "tree",
    "questions",
    "skipped",
    "vanilla tok/s",
    "PRISM tok/s",
    "speed-up [95 % CI]",
    "end to end",
    "AL pooled [95 % CI]",
    "AL mean [95 % CI]",
    "accepted per draft step",
    "identical",
)


def rows(result: BenchResult) -> list[tuple[str, ...]]:
    """One row of `HEADER` per summary."""
    return [_row(summary) for summary in result.summaries]


def markdown(result: BenchResult) -> str:
    """The result as one Markdown table with the settings that produced it."""
    settings, band = result.settings, result.bandwidth_gb_s
    parts = (result.engine.profile, result.engine.runtime, result.engine.isa, result.engine.dtype)
    engine = " ".join(part for part in parts if part)
    lines = [
        f"Batch 1, at most {settings.max_new_tokens} new tokens, temperature {settings.temperature:g}, "
        f"{settings.repeats} repeat(s), modes interleaved question by question; tok/s are pooled and leave out the "
        "prefill, except for the end-to-end ratio.",
        "",
        f"Machine: {result.environment.processor}, {result.engine.threads} threads; memory bandwidth during the "
        f"run {band.median:.0f} GB/s (from {band.low:.0f} to {band.high:.0f}). Engine: {engine}; "
        f"torch {result.environment.torch}.",
        "",
        _line(HEADER),
        _line(("---",) * len(HEADER)),
        *(_line(row) for row in rows(result)),
    ]
    return "\n".join(lines) + "\n"


def write_markdown(result: BenchResult, path: Path) -> None:
    """Write `markdown(result)`, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(markdown(result), encoding="utf-8")


def console_table(result: BenchResult) -> Table:
    """The rows that fit a terminal."""
    table = Table(title="PRISM against vanilla decoding, batch 1")
    for name in (
        "set",
        "tree",
        "vanilla tok/s",
        "PRISM tok/s",
        "speed-up",
        "AL",
        "accepted per draft step",
        "identical",
    ):
        table.add_column(name, justify="left" if name in ("set", "tree", "accepted per draft step") else "right")
    for summary in result.summaries:
        table.add_row(
            summary.set,
            summary.tree,
            _number(summary.vanilla.decode_tps, 1),
            _number(summary.prism.decode_tps, 1),
            _number(summary.speedup, 2),
            _number(summary.al_pooled, 2),
            _steps(summary),
            _yes_no(summary.identical),
            style="bold" if summary.set == OVERALL else None,
        )
    return table


def _row(summary: Summary) -> tuple[str, ...]:
    return (
        summary.set,
        summary.tree,
        str(summary.questions),
        str(summary.skipped),
        _number(summary.vanilla.decode_tps, 1),
        _number(summary.prism.decode_tps, 1),
        _number(summary.speedup, 2) + _bounds(summary.speedup_interval),
        _number(summary.end_to_end_speedup, 2),
        _number(summary.al_pooled, 2) + _bounds(summary.al_pooled_interval),
        _number(summary.al_question_mean, 2) + _bounds(summary.al_question_mean_interval),
        _steps(summary),
        _yes_no(summary.identical),
    )


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _bounds(interval: Interval | None) -> str:
    return "" if interval is None else f" [{interval.low:.2f}, {interval.high:.2f}]"


def _steps(summary: Summary) -> str:
    return " ".join(_number(share, 2) for share in summary.step_acceptance)


def _yes_no(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "NO"
