"""Figures shared by the bench and the quickstart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from prism_trt.manifest import atomic_file

Bounds = tuple[float, float]


def step_acceptance_figure(series: Mapping[str, Sequence[float | None]]) -> Figure:
    """Lines of the accepted share per draft step, one per name; None is a gap."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, shares in series.items():
        axes.plot(range(1, len(shares) + 1), [float("nan") if x is None else x for x in shares], "o-", label=name)
    steps = max((len(shares) for shares in series.values()), default=1)
    axes.set(xlabel="draft step", ylabel="accepted, of rounds that reached it", ylim=(0, 1), xticks=range(1, steps + 1))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def bars_figure(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    bounds: Mapping[str, Sequence[Bounds | None]],
    ylabel: str,
    baseline: float | None = None,
) -> Figure:
    """Grouped bars with error bars, and a dashed `baseline` when given."""
    figure = Figure(figsize=(max(6.0, 1.1 * len(groups)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(series))
    for index, (name, values) in enumerate(series.items()):
        places = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
        heights = [value or 0.0 for value in values]
        axes.bar(places, heights, width=0.95 * width, label=name)
        for place, height, interval in zip(places, heights, bounds.get(name, ()), strict=False):
            if interval is not None:
                low, high = interval
                errors = [[max(0.0, height - low)], [max(0.0, high - height)]]
                axes.errorbar(place, height, yerr=errors, color="black", capsize=3)
    if baseline is not None:
        axes.axhline(baseline, color="grey", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG, atomically."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
