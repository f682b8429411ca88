"""Command line of `prism_trt.inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

UNSOUND = 2
"""Exit code for something that is not sound, or not recognised."""


def app() -> typer.Typer:
    """The `inspect` command."""
    command = typer.Typer(add_completion=False, help="Say what a file or directory is and whether it is sound.")

    @command.command()
    def inspect(
        path: Annotated[Path, typer.Argument(help="target, drafter, engine, feature cache or model repository")],
        target: Annotated[Path | None, typer.Option(help="also check that PATH belongs to this target")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
    ) -> None:
        """Say what PATH is and whether it is sound. Exits with 0 when it is and with 2 when it is not."""
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

    return command
