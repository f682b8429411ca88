"""Command line of `prism_trt.deploy`."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer


def app() -> typer.Typer:
    """The `deploy` command."""
    command = typer.Typer(add_completion=False, help="Write a Triton model repository and serve it.")

    @command.command()
    def deploy(
        engine: Annotated[Path, typer.Option(help="Engine directory.")],
        out: Annotated[Path, typer.Option(help="Model repository to write.")],
        run: Annotated[bool, typer.Option("--run", help="Serve it until Ctrl-C or SIGTERM.")] = False,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing repository.")] = False,
        model: Annotated[str, typer.Option(help="Name of the served model.")] = "prism",
        tree: Annotated[
            str | None, typer.Option(help="Draft tree SIZE/WIDTH/DEPTH, or none.  [default: the engine's]")
        ] = None,
        slots: Annotated[
            int | None, typer.Option(min=1, help="Requests decoded together.  [default: the engine's]")
        ] = None,
        threads: Annotated[
            int | None, typer.Option(min=1, help="CPU threads.  [default: all processors, at most 16]")
        ] = None,
        backlog: Annotated[int, typer.Option(min=0, help="Requests that may wait before others are refused.")] = 256,
        grpc_port: Annotated[int, typer.Option(min=1, max=65535)] = 8001,
        http_port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
        metrics_port: Annotated[int, typer.Option(min=1, max=65535)] = 8002,
        grace: Annotated[float, typer.Option(min=0, help="Seconds open requests get when the server stops.")] = 10.0,
        log: Annotated[Path | None, typer.Option(help="File for the server's log.")] = None,
    ) -> None:
        """Write a model repository for an engine and, with --run, serve it on the loopback interface."""

        def write() -> Path:
            from prism_trt.deploy.repository import write_repository

            repository = write_repository(
                engine,
                out,
                model,
                tree=tree,
                slots=slots,
                threads=threads,
                backlog=backlog,
                overwrite=overwrite,
            )
            typer.echo(f"{repository}: model repository with the model {model}")
            return repository

        if not run:
            write()
            return
        signals = _StopSignals()
        try:
            # Importing torch is part of this and takes seconds, in which a signal may arrive as well.
            repository = write()
            signals.check()
            _serve(repository, {"grpc": grpc_port, "http": http_port, "metrics": metrics_port}, grace, log, signals)
        except _Stop:
            typer.echo("stopped")
        finally:
            signals.restore()

    return command


class _Stop(BaseException):
    """Somebody asked for the end."""


class _StopSignals:
    """Turns SIGINT, SIGTERM and SIGHUP into `_Stop`.

    They are remembered because an exception that is raised inside an import or a destructor may get lost.
    """

    def __init__(self) -> None:
        self._seen = False
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._seen = True
        raise _Stop

    def check(self) -> None:
        """Raise `_Stop` if a signal has arrived."""
        if self._seen:
            raise _Stop

    def restore(self) -> None:
        """Back to the former handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _serve(repository: Path, ports: dict[str, int], grace: float, log: Path | None, signals: _StopSignals) -> None:
    """Serve until a signal; a second one skips the grace period."""
    from prism_trt.deploy.server import TritonServer
    from prism_trt.progress import progress

    server = TritonServer(
        repository,
        grpc_port=ports["grpc"],
        http_port=ports["http"],
        metrics_port=ports["metrics"],
        log=log,
        grace=grace,
    )
    try:
        with progress("Starting the server"):
            server.start()
        signals.check()
        typer.echo(f"serving {server.model_name}: gRPC {server.grpc_url}, HTTP {server.http_url}, {server.metrics_url}")
        server.wait()
    except _Stop:
        typer.echo("stopping")
        raise
    finally:
        try:
            server.stop()
        except _Stop:
            server.stop()
