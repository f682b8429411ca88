"""Command line of `prism_trt.inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism_trt.errors import PrismError

UNSOUND = 2
"""Exit code for something that is not sound, or not recognised."""


def app() -> typer.Typer:
    """The `inspect` command."""
    command = typer.Typer(add_completion=False, help="Say what a file or directory is and whether it is sound.")

    @command.command()
    def inspect(
        path: Annotated[
            Path | None,
            typer.Argument(help="target, drafter, engine, bundle, checkpoint, feature cache or model repository"),
        ] = None,
        data: Annotated[Path | None, typer.Option(help="show this file of training records instead")] = None,
        target: Annotated[
            Path | None,
            typer.Option(help="also check that PATH belongs to this target, or show the data as it will see them"),
        ] = None,
        records: Annotated[int, typer.Option(min=0, help="records of the data to print")] = 3,
        as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
    ) -> None:
        """Say what PATH is and whether it is sound, or show training data.

        Exits with 0 when it is sound and with 2 when it is not.
        """
        if path is not None and data is None:
            _inspect_artifact(path, target, as_json)
        elif data is not None and path is None:
            _show_data(data, target, records, as_json)
        else:
            raise PrismError("say what to inspect: either PATH or --data FILE")

    return command


def _inspect_artifact(path: Path, target: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from prism_trt.inspect.artifacts import inspect_path
    from prism_trt.inspect.report import to_json, to_tables

    report = inspect_path(path, target)
    if as_json:
        typer.echo(to_json(report))
    else:
        console = Console()
        for table in to_tables(report):
            console.print(table)
    if not report.sound:
        raise typer.Exit(UNSOUND)


def _show_data(path: Path, target: Path | None, records: int, as_json: bool) -> None:
    from rich.console import Console

    from prism_trt.inspect.data import show, to_json, view_data

    view = view_data(path, target, records)
    if as_json:
        typer.echo(to_json(view))
    else:
        show(view, Console())
