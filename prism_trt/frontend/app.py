"""Command line of `prism_trt.frontend`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def app() -> typer.Typer:
    """The `frontend` command."""
    command = typer.Typer(add_completion=False, help="Offer a server through OpenAI's API.")

    @command.command()
    def frontend(
        grpc_url: Annotated[str, typer.Option(help="HOST:PORT of the server's gRPC endpoint.")] = "127.0.0.1:8001",
        model: Annotated[str, typer.Option(help="Name of the served model.")] = "prism",
        host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any.")] = 8080,
        api_key_file: Annotated[
            Path | None, typer.Option(help="File with the API keys, one a line.  [default: no key is needed]")
        ] = None,
        tls_cert: Annotated[Path | None, typer.Option(help="Certificate (PEM) to serve HTTPS with.")] = None,
        tls_key: Annotated[Path | None, typer.Option(help="Key (PEM) of that certificate.")] = None,
        grpc_tls_ca: Annotated[
            Path | None, typer.Option(help="Authorities (PEM) of the server's certificate.  [default: no TLS to it]")
        ] = None,
        max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for, in tokens.")] = 4096,
        max_body_bytes: Annotated[int, typer.Option(min=1, help="Largest request.")] = 1 << 20,
        max_requests: Annotated[int, typer.Option(min=1, help="Requests that may run or wait at once.")] = 256,
        timeout: Annotated[float, typer.Option(min=0.1, help="Longest silence of the server, in seconds.")] = 120.0,
        grace: Annotated[float, typer.Option(min=0, help="Seconds open answers get when this stops.")] = 30.0,
    ) -> None:
        """Offer the server started with `python -m prism_trt.deploy --run` through OpenAI's API."""
        from prism_trt.client.limits import INT32, check_integer, check_seconds, check_text
        from prism_trt.errors import PrismError
        from prism_trt.frontend.connections import Connections, connections_for
        from prism_trt.frontend.guard import ApiKeys
        from prism_trt.frontend.logs import log_to_stderr
        from prism_trt.frontend.server import Address, serve
        from prism_trt.frontend.service import Settings, create_app

        check_seconds("--timeout", timeout)
        check_seconds("--grace", grace)
        check_integer("--max-tokens", max_tokens, INT32)
        check_integer("--max-requests", max_requests, INT32)
        check_text("--model", model)
        check_text("--grpc-url", grpc_url)
        address = Address(host, port, tls_cert, tls_key)
        keys = ApiKeys.read(api_key_file) if api_key_file else None
        if keys is None and not address.loopback:
            raise PrismError(f"{host} can be reached from other machines: pass --api-key-file")
        log_to_stderr()
        most = connections_for(max_requests)
        settings = Settings(
            model=model,
            grpc_url=grpc_url,
            grpc_tls_ca=grpc_tls_ca,
            max_tokens=max_tokens,
            max_body_bytes=max_body_bytes,
            max_requests=min(max_requests, most // 2),  # who is refused must be able to connect
            timeout=timeout,
        )
        app = create_app(settings, keys)
        serve(app, address, Connections(most), grace, lambda url: typer.echo(f"serving {model}: {url}"))

    return command
