"""`python -m prism_trt.bench.merge`: methods measured in several runs on the same questions, as one comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prism_trt.bench.figures import write_plots
from prism_trt.bench.report import write_markdown
from prism_trt.bench.results import OVERALL, VANILLA, BenchResult, QuestionRecord, write_json
from prism_trt.bench.summary import summarise
from prism_trt.cli import run
from prism_trt.config import parse_json_file
from prism_trt.errors import PrismError

_SAME = ("trees", "temperatures", "max_new_tokens", "replay", "seed", "repeats", "bootstrap_samples")
"""Settings on which counts, or what is computed from them, depend."""


def app() -> typer.Typer:
    """The `bench.merge` command."""
    command = typer.Typer(add_completion=False, help="Bench results of several runs as one comparison.")
    command.command()(merge_files)
    return command


def merge_files(
    results: Annotated[list[Path], typer.Argument(help="Bench results; settings are those of the first.")],
    json: Annotated[Path, typer.Option(help="Where the result is written.")],
    markdown: Annotated[Path | None, typer.Option(help="Where tables are written.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Directory for PNG plots.")] = None,
    reference: Annotated[str | None, typer.Option(help="Method that the others are compared with.")] = None,
    rename: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Name for a method of the first result; repeated.")
    ] = None,
) -> None:
    """Put the methods of several bench results into one, with their ratios on the same questions.

    Only results without times: those of different runs do not compare.
    """
    first, *others = (parse_json_file(BenchResult, path) for path in results)
    for option in rename or []:
        old, _, new = option.partition("=")
        if not new or old not in first.drafting:
            raise PrismError(f"--rename {option!r} is not of the form OLD=NEW with a method of {results[0]}")
        first = renamed(first, old, new)
    merged = merge([first, *others], reference)
    write_json(merged, json)
    if markdown is not None:
        write_markdown(merged, markdown)
    if plots is not None:
        write_plots(merged, plots)
    typer.echo(f"{', '.join(merged.drafting)} on {len(merged.questions)} questions: {json}")


def renamed(result: BenchResult, old: str, new: str) -> BenchResult:
    """`result` with another name for a method; its summaries keep the former until it is merged."""

    def change(record: Any) -> Any:
        return record.model_copy(update={"method": new}) if record.method == old else record

    return result.model_copy(
        update={
            "methods": tuple(
                method.model_copy(update={"name": new}) if method.name == old else method for method in result.methods
            ),
            "questions": tuple(
                record.model_copy(update={"generations": tuple(map(change, record.generations))})
                for record in result.questions
            ),
        }
    )


def merge(results: list[BenchResult], reference: str | None) -> BenchResult:
    """All methods of `results` over their questions, in the first's order.

    Args:
        results: at least one; environment, bandwidth and settings are those of the first.
        reference: method that the others are compared with; None: no comparison.

    Raises:
        PrismError: the results were timed, differ in settings, questions or the target's answers, or share a method.
    """
    first = results[0]
    answered = [{_answered(record): record for record in result.questions} for result in results]
    settings = first.settings.model_copy(update={"reference": reference})
    for number, (result, records) in enumerate(zip(results, answered, strict=True), 1):
        if result.settings.timed:
            raise PrismError(
                f"result {number} has times, which those of another run do not compare with: merge replays"
            )
        for name in _SAME:
            if getattr(result.settings, name) != getattr(settings, name):
                raise PrismError(f"result {number} was measured with another {name}: run the bench alike")
        if records.keys() != answered[0].keys():
            raise PrismError(
                f"result {number} has other questions, or the target answers differently: run the bench alike"
            )
    names = [name for result in results for name in result.drafting]
    if twice := [name for name in names if names.count(name) > 1]:
        raise PrismError(f"the method {twice[0]} is in several results: use --rename")
    if reference is not None and reference not in names:
        raise PrismError(f"the reference {reference} is in no result: name one of {', '.join(names)}")
    merged = [
        record.model_copy(
            update={
                "generations": (
                    *(entry for entry in record.generations if entry.method == VANILLA),
                    *(entry for one in answered for entry in one[key].generations if entry.method != VANILLA),
                )
            }
        )
        for key, record in answered[0].items()
    ]
    skipped = {entry.set: entry.skipped for entry in first.summaries if entry.set != OVERALL}
    methods = tuple(method for result in results for method in result.methods if method.name != VANILLA)
    return first.model_copy(
        update={
            "settings": settings,
            "methods": methods,
            "summaries": summarise(merged, skipped, settings, methods),
            "questions": tuple(merged),
        }
    )


def _answered(record: QuestionRecord) -> tuple[Any, ...]:
    """What must be alike: the question and the lengths of the target's own answers."""
    own = tuple(
        (entry.turn, entry.repeat, entry.prompt_tokens, entry.output_tokens)
        for entry in record.generations
        if entry.method == VANILLA
    )
    return record.set, record.question_id, record.turns, own


if __name__ == "__main__":
    run(app())
