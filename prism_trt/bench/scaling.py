"""`python -m prism_trt.bench.scaling`: acceptance length against the size of the training data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from prism_trt.bench.report import estimate_text, markdown_table
from prism_trt.bench.results import BenchResult, Estimate
from prism_trt.cli import run
from prism_trt.config import TreeShape, parse_json_file
from prism_trt.errors import PrismError
from prism_trt.manifest import atomic_file
from prism_trt.plots import save_figure, scaling_figure

Curves = dict[str, list[tuple[float, Estimate]]]
"""By method: (size, pooled acceptance length over all sets), sizes ascending."""


def app() -> typer.Typer:
    """The `bench.scaling` command."""
    command = typer.Typer(add_completion=False, help="Acceptance length against the size of the training data.")
    command.command()(scaling)
    return command


def scaling(
    point: Annotated[
        list[str], typer.Option(metavar="SIZE=FILE", help="Size of the training data and a bench result; repeated.")
    ],
    plot: Annotated[Path, typer.Option(help="Where the PNG plot is written.")],
    markdown: Annotated[Path | None, typer.Option(help="Where a Markdown table is written.")] = None,
    tree: Annotated[str | None, typer.Option(help="SIZE/WIDTH/DEPTH. Default: the results' first tree.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    unit: Annotated[str, typer.Option(help="What the sizes count.")] = "training conversations",
) -> None:
    """Draw and tabulate the acceptance length of every method over a logarithmic axis of data sizes."""
    results = read_points(point)
    shape = next(iter(results.values())).settings.trees[0] if tree is None else TreeShape.parse(tree)
    found = curves(results, shape, temperature)
    label = f"acceptance length (pooled), tree {shape}, T={temperature:g}"
    bounded = {
        method: [(size, (entry.value, entry.low, entry.high)) for size, entry in points]
        for method, points in found.items()
    }
    table = scaling_table(found, unit)
    save_figure(scaling_figure(bounded, unit, label), plot)
    if markdown is not None:
        with atomic_file(markdown) as temporary:
            temporary.write_text(f"{label[0].upper()}{label[1:]}, with 95 % intervals:\n\n{table}\n", encoding="utf-8")
    typer.echo(table)


def read_points(options: list[str]) -> dict[float, BenchResult]:
    """Bench results by size, ascending, from options of the form ``SIZE=FILE``.

    Raises:
        PrismError: an option is of another form, a size appears twice, or a file is not a bench result.
    """
    results: dict[float, BenchResult] = {}
    for option in options:
        text, _, file = option.partition("=")
        try:
            size = float(text)
        except ValueError:
            size = 0.0
        if not file or not size > 0:
            raise PrismError(
                f"--point {option!r} is not of the form SIZE=FILE with a positive size, such as 1000=r.json"
            )
        if size in results:
            raise PrismError(f"size {text} appears twice: give the results of one size as one bench run")
        results[size] = parse_json_file(BenchResult, Path(file))
    return dict(sorted(results.items()))


def curves(results: Mapping[float, BenchResult], tree: TreeShape, temperature: float) -> Curves:
    """Pooled acceptance length over all sets of every method at every size.

    Raises:
        PrismError: a result has no such tree or temperature, or was measured on other questions than the first.
    """
    found: Curves = {}
    asked = [_asked(result) for result in results.values()]
    for size, result in results.items():
        if tree not in result.settings.trees or temperature not in result.settings.temperatures:
            raise PrismError(
                f"the result of size {size:g} has no tree {tree} at temperature {temperature:g}: "
                "choose what all results have with --tree and --temperature"
            )
        if _asked(result) != asked[0]:
            raise PrismError(
                f"the result of size {size:g} answers other questions, or longer or shorter, than the first: "
                "run the bench alike for every size"
            )
        for method in result.drafting:
            length = result.overall(method, tree, temperature).al_pooled
            if length is not None:
                found.setdefault(method, []).append((size, length))
    return found


def scaling_table(found: Curves, unit: str) -> str:
    """A Markdown table with one row per size and one column per method."""
    sizes = sorted({size for points in found.values() for size, _ in points})
    lines = [[f"{size:g}", *(estimate_text(dict(points).get(size)) for points in found.values())] for size in sizes]
    return markdown_table([unit, *found], lines)


def _asked(result: BenchResult) -> tuple[int, list[tuple[str, int | str]]]:
    return result.settings.max_new_tokens, [(record.set, record.question_id) for record in result.questions]


if __name__ == "__main__":
    run(app())
