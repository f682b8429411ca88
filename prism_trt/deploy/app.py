"""Command line of `prism_trt.deploy`."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from prism_trt.deploy.admin import read_key
from prism_trt.errors import PrismError
from prism_trt.interrupts import outside_imports

if TYPE_CHECKING:
    from prism_trt.deploy.server import TritonServer
    from prism_trt.deploy.supervisor import Supervision

_LONGEST_SECONDS = 86400.0


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
            str | None, typer.Option(help="Draft tree SIZE/WIDTH/DEPTH, none, or auto.  [default: auto]")
        ] = None,
        slots: Annotated[
            int | None, typer.Option(min=1, help="Requests decoded together.  [default: the engine's]")
        ] = None,
        threads: Annotated[
            int | None, typer.Option(min=1, help="CPU threads.  [default: all processors, at most 16]")
        ] = None,
        backlog: Annotated[int, typer.Option(min=0, help="Requests that may wait before others are refused.")] = 256,
        prefill_tokens: Annotated[
            int | None,
            typer.Option(min=1, help="Prompt tokens computed between two rounds.  [default: a quarter of a call]"),
        ] = None,
        prefix_cache: Annotated[
            bool, typer.Option(help="Keep what was computed for prompts that begin like earlier ones.")
        ] = True,
        grpc_port: Annotated[int, typer.Option(min=1, max=65535)] = 8001,
        http_port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
        metrics_port: Annotated[int, typer.Option(min=1, max=65535)] = 8002,
        readiness_port: Annotated[
            int, typer.Option(min=1, max=65535, help="Port of /ready, which knows whether the model works.")
        ] = 8003,
        start_timeout: Annotated[
            float, typer.Option(min=1, help="Seconds until the first token must be made.")
        ] = 120.0,
        hang_timeout: Annotated[
            float, typer.Option(min=1, help="Seconds of silence after which a hanging server is replaced.")
        ] = 60.0,
        restarts: Annotated[int, typer.Option(min=0, help="Replacements in a row of a server that fails.")] = 5,
        grace: Annotated[float, typer.Option(min=0, help="Seconds open requests get when the server stops.")] = 10.0,
        admin_key_file: Annotated[
            Path | None,
            typer.Option(help="File with a key whose holders may unload and load the model.  [default: nobody may]"),
        ] = None,
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
                prefill_tokens=prefill_tokens,
                prefix_cache=prefix_cache,
                overwrite=overwrite,
                reuse=run,
            )
            typer.echo(f"{repository}: model repository with the model {model}")
            return repository

        _check_seconds({"--start-timeout": start_timeout, "--hang-timeout": hang_timeout, "--grace": grace})
        _check_ports(
            {
                "--grpc-port": grpc_port,
                "--http-port": http_port,
                "--metrics-port": metrics_port,
                "--readiness-port": readiness_port,
            }
        )
        admin_key = read_key(admin_key_file) if admin_key_file else None
        if not run:
            if admin_key:
                raise PrismError("--admin-key-file is for a server: pass --run as well")
            write()
            return
        signals = _StopSignals()
        try:
            # Importing torch is part of this and takes seconds, in which a signal may arrive as well.
            repository = write()
            signals.check()
            from prism_trt.deploy.server import TritonServer
            from prism_trt.deploy.supervisor import Supervision

            server = TritonServer(
                repository,
                grpc_port=grpc_port,
                http_port=http_port,
                metrics_port=metrics_port,
                log=log,
                start_timeout=start_timeout,
                grace=grace,
                admin_key=admin_key,
            )
            supervision = Supervision(canary_patience=hang_timeout / 3, hang_timeout=hang_timeout, restarts=restarts)
            _serve(server, supervision, readiness_port, signals)
        except _Stop:
            typer.echo("stopped")
        finally:
            signals.restore()

    return command


def _check_seconds(seconds: dict[str, float]) -> None:
    """Refuse what no clock can wait for."""
    for option, value in seconds.items():
        if not value <= _LONGEST_SECONDS:  # nor is nan
            raise PrismError(f"{option} is {value:g}: name seconds, at most {_LONGEST_SECONDS:g}")


def _check_ports(ports: dict[str, int]) -> None:
    """Refuse options that name one port twice: Triton would answer with its help text."""
    options: dict[int, str] = {}
    for option, port in ports.items():
        if other := options.get(port):
            raise PrismError(f"{other} and {option} are both {port}: choose different ports")
        options[port] = option


class _Stop(BaseException):
    """Somebody asked for the end."""


class _StopSignals:
    """Turns SIGINT, SIGTERM and SIGHUP into `_Stop`.

    They are remembered because an exception that is raised inside a destructor gets lost.
    """

    def __init__(self) -> None:
        self._seen = False
        numbers, handler = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), outside_imports(self._handle)
        self._before = {number: signal.signal(number, handler) for number in numbers}

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


def _serve(server: TritonServer, supervision: Supervision, readiness_port: int, signals: _StopSignals) -> None:
    """Serve until a signal; a second one skips the grace period."""
    from prism_trt.deploy.readiness import Readiness, serve_readiness
    from prism_trt.deploy.server import HOST
    from prism_trt.deploy.supervisor import Supervisor
    from prism_trt.progress import progress

    readiness = Readiness()
    with serve_readiness(readiness, HOST, readiness_port) as ready_url:
        try:
            with progress("Starting the server"):
                server.start()
            signals.check()
            readiness.problem = None
            typer.echo(
                f"serving {server.model_name}: gRPC {server.grpc_url}, HTTP {server.http_url}, {server.metrics_url}, "
                f"{ready_url}"
            )
            Supervisor(server, supervision, readiness, typer.echo).run()
        except _Stop:
            readiness.problem = "the server is stopping"
            typer.echo("stopping")
            raise
        finally:
            try:
                server.stop()
            except _Stop:
                server.stop()
