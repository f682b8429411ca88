"""Plots of a bench result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from prism_trt.bench.results import BenchResult, Estimate, Summary
from prism_trt.plots import bars_figure, save_figure, step_acceptance_figure


def write_plots(result: BenchResult, directory: Path) -> list[Path]:
    """Write the plots of every tree and temperature; returns their paths.

    `step_acceptance.png`, `acceptance_length.png` and, when it was measured, `speedup.png`, each by method. With
    several trees or temperatures the names end in ``_SIZE-WIDTH-DEPTH_tTEMPERATURE``.
    """
    settings = result.settings
    several = len(settings.trees) * len(settings.temperatures) > 1
    figures: dict[str, Figure] = {}
    for tree in settings.trees:
        for temperature in settings.temperatures:
            ending = f"_{str(tree).replace('/', '-')}_t{temperature:g}" if several else ""
            chosen = {
                method: [
                    summary
                    for summary in result.summaries
                    if (summary.method, summary.tree, summary.temperature) == (method, str(tree), temperature)
                ]
                for method in result.drafting
            }
            figures[f"step_acceptance{ending}.png"] = step_acceptance_figure(
                {method: result.overall(method, tree, temperature).step_acceptance for method in result.drafting}
            )
            figures[f"acceptance_length{ending}.png"] = _bars(
                chosen, lambda summary: summary.al_pooled, "acceptance length (pooled)"
            )
            if settings.timed:
                figures[f"speedup{ending}.png"] = _bars(
                    chosen, lambda summary: summary.speedup, "decode speed-up over vanilla"
                )
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        save_figure(figure, directory / name)
    return [directory / name for name in figures]


def _bars(by_method: dict[str, list[Summary]], estimate: Callable[[Summary], Estimate | None], label: str) -> Figure:
    sets = list(dict.fromkeys(summary.set for summaries in by_method.values() for summary in summaries))
    estimates = {method: [estimate(summary) for summary in summaries] for method, summaries in by_method.items()}
    return bars_figure(sets, {method: _bounds(found) for method, found in estimates.items()}, label, baseline=1.0)


def _bounds(estimates: Sequence[Estimate | None]) -> list[tuple[float, float, float] | None]:
    return [None if found is None else (found.value, found.low, found.high) for found in estimates]
