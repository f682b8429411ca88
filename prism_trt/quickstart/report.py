"""What the quickstart shows and writes at its end."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from prism_trt.bench.results import BenchResult, Summary
from prism_trt.config import StrictModel
from prism_trt.errors import PrismError
from prism_trt.plots import save_figure


class QuickstartResult(StrictModel):
    """The quickstart's JSON."""

    vanilla_tps: float
    prism_tps: float
    speedup: float
    acceptance_length: float
    identical: bool
    per_step_acceptance: tuple[float | None, ...]


def overall(result: BenchResult) -> Summary:
    """The summary of the one method and tree that were run."""
    return result.overall(result.drafting[0], result.settings.trees[0])


def quickstart_result(result: BenchResult) -> QuickstartResult:
    """The figures of a greedy bench run with one tree.

    Raises:
        PrismError: every answer ended with its first token, so that nothing was decoded.
    """
    summary = overall(result)
    values = (summary.vanilla.decode_tps, summary.rates.decode_tps, summary.speedup, summary.al_pooled)
    vanilla, prism, speedup, length = values
    if vanilla is None or prism is None or speedup is None or length is None or summary.identical is None:
        raise PrismError("every answer ended after one token, so there is no speed to report: check the target model")
    return QuickstartResult(
        vanilla_tps=vanilla,
        prism_tps=prism,
        speedup=speedup.value,
        acceptance_length=length.value,
        identical=summary.identical,
        per_step_acceptance=summary.step_acceptance,
    )


def result_table(result: BenchResult) -> Table:
    """Vanilla and PRISM side by side."""
    summary, figures = overall(result), quickstart_result(result)
    table = Table(title=f"Vanilla decoding and PRISM, tree {summary.tree}, {summary.questions} prompts")
    table.add_column("")
    table.add_column("vanilla", justify="right")
    table.add_column("PRISM", justify="right", style="bold green")
    table.add_row("tokens per second", f"{figures.vanilla_tps:.0f}", f"{figures.prism_tps:.0f}")
    spread = summary.speedup
    bounds = f" ({spread.low:.2f} to {spread.high:.2f})" if spread else ""
    table.add_row("speed-up (95 % interval)", "", f"{figures.speedup:.2f}{bounds}")
    table.add_row("tokens per target pass", "1.00", f"{figures.acceptance_length:.2f}")
    for step, share in enumerate(figures.per_step_acceptance, start=1):
        table.add_row(f"accepted at draft step {step}", "", "-" if share is None else f"{share:.0%}")
    table.add_row("output identical", "", "yes" if figures.identical else "[bold red]NO[/]")
    return table


def quickstart_figure(figures: QuickstartResult) -> Figure:
    """Tokens per second on the left, accepted share per draft step on the right."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    bars = left.bar(["vanilla", "PRISM"], [figures.vanilla_tps, figures.prism_tps], color=["tab:gray", "tab:green"])
    left.bar_label(bars, fmt="%.0f")
    left.margins(y=0.1)
    left.set(ylabel="tokens per second", title=f"{figures.speedup:.2f} times as fast")
    shares = [float("nan") if share is None else share for share in figures.per_step_acceptance]
    steps = range(1, len(shares) + 1)
    right.bar(steps, shares, color="tab:green")
    right.set(xlabel="draft step", ylabel="accepted, of rounds that reached it", ylim=(0, 1), xticks=steps)
    right.set_title(f"{figures.acceptance_length:.2f} tokens per target pass")
    return figure


def write_figure(figures: QuickstartResult, path: Path) -> None:
    """Write `quickstart_figure` as PNG, atomically."""
    save_figure(quickstart_figure(figures), path)
