"""Figures shared by the bench and the quickstart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from prism_trt.manifest import atomic_file

Bounded = tuple[float, float, float]
"""A value with the ends of its interval: (value, low, high)."""


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
    groups: Sequence[str], series: Mapping[str, Sequence[Bounded | None]], ylabel: str, baseline: float | None = None
) -> Figure:
    """Grouped bars with error bars, one colour per name, and a dashed `baseline` when given; None is a gap."""
    figure = Figure(figsize=(min(max(6.0, 0.5 * len(groups) * (1 + len(series))), 14.0), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(series))
    for index, (name, values) in enumerate(series.items()):
        known = [(group, value) for group, value in enumerate(values) if value is not None]
        places = [group + (index - (len(series) - 1) / 2) * width for group, _ in known]
        heights, errors = _heights_and_errors([value for _, value in known])
        axes.bar(places, heights, width=0.95 * width, label=name, yerr=errors, capsize=2)
    if baseline is not None:
        axes.axhline(baseline, color="grey", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", alpha=0.3)
    axes.margins(x=0.01)
    figure.legend(loc="outside upper center", ncols=len(series))
    return figure


def scaling_figure(series: Mapping[str, Sequence[tuple[float, Bounded]]], xlabel: str, ylabel: str) -> Figure:
    """Lines of values with error bars over a logarithmic x axis, one per name."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        heights, errors = _heights_and_errors([value for _, value in points])
        axes.errorbar([x for x, _ in points], heights, yerr=errors, fmt="o-", capsize=3, label=name)
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    sizes = sorted({x for points in series.values() for x, _ in points})
    axes.set_xticks(sizes, [f"{size:,g}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG, atomically."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _heights_and_errors(values: Sequence[Bounded]) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Values, and how far their intervals reach below and above them."""
    below = [max(0.0, value - low) for value, low, _ in values]
    above = [max(0.0, high - value) for value, _, high in values]
    return [value for value, _, _ in values], (below, above)
