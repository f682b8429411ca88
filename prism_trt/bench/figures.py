"""Plots of a bench result."""

from __future__ import annotations

from pathlib import Path

from prism_trt.bench.results import BenchResult, Interval
from prism_trt.plots import bars_figure, save_figure, step_acceptance_figure


def write_plots(result: BenchResult, directory: Path) -> list[Path]:
    """Write `step_acceptance.png`, `acceptance_length.png` and `speedup.png`; returns their paths."""
    trees = [str(tree) for tree in result.settings.trees]
    groups = list(dict.fromkeys(summary.set for summary in result.summaries))
    by_tree = {tree: [summary for summary in result.summaries if summary.tree == tree] for tree in trees}
    figures = {
        "step_acceptance.png": step_acceptance_figure(
            {
                f"tree {tree}": result.overall(shape).step_acceptance
                for tree, shape in zip(trees, result.settings.trees, strict=True)
            }
        ),
        "acceptance_length.png": bars_figure(
            groups,
            {f"tree {tree}": [entry.al_pooled for entry in entries] for tree, entries in by_tree.items()},
            {
                f"tree {tree}": [_pair(entry.al_pooled_interval) for entry in entries]
                for tree, entries in by_tree.items()
            },
            "acceptance length (pooled)",
            baseline=1.0,
        ),
        "speedup.png": bars_figure(
            groups,
            {f"tree {tree}": [entry.speedup for entry in entries] for tree, entries in by_tree.items()},
            {f"tree {tree}": [_pair(entry.speedup_interval) for entry in entries] for tree, entries in by_tree.items()},
            "decode speed-up over vanilla",
            baseline=1.0,
        ),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        save_figure(figure, directory / name)
    return [directory / name for name in figures]


def _pair(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (interval.low, interval.high)
