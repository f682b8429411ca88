"""Run the application until a signal ends it."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import uvicorn
from fastapi import FastAPI

from prism_trt.errors import PrismError
from prism_trt.frontend.connections import Connections, Listener, Protocol

_CUT_SECONDS = 5
"""What open connections get after the grace period to send their last error."""


@dataclass(frozen=True)
class Address:
    """Where to listen, and with which certificate."""

    host: str = "127.0.0.1"
    port: int = 8080
    certificate: Path | None = None
    key: Path | None = None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def bind(self) -> socket.socket:
        """A listening socket.

        Raises:
            PrismError: the address cannot be used.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return socket.create_server((self.host, self.port), family=family, backlog=512)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PrismError(
                f"cannot listen on {self.host} port {self.port} ({reason}): pass --host and --port"
            ) from None

    def check_certificate(self) -> None:
        """Raises PrismError unless certificate and key are both absent or belong together."""
        if self.certificate is None and self.key is None:
            return
        if self.certificate is None or self.key is None:
            raise PrismError("TLS needs a certificate and its key: pass both --tls-cert and --tls-key")
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key)
        except OSError as error:
            reason = error.strerror or error
            raise PrismError(f"{self.certificate} and {self.key} are no certificate and key ({reason})") from None


class Server(uvicorn.Server):
    """Ends open answers with an error, rather than in mid-sentence, when the grace period is over."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, grace: float) -> None:
        super().__init__(config)
        self._app, self._grace = app, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._grace, self._app.state.triton.end_calls)
        await super().shutdown(sockets)


def configure(app: FastAPI, address: Address, connections: Connections, grace: float) -> uvicorn.Config:
    """How uvicorn serves `app`."""
    return uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], partial(Protocol, connections=connections)),
        loop="asyncio",  # others accept connections without asking `Listener`
        callback_notify=connections.end_idle,
        timeout_notify=1,
        log_config=None,
        log_level="warning",
        access_log=False,  # paths may hold what clients misplace there, such as keys
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=round(grace) + _CUT_SECONDS,
        ssl_certfile=address.certificate,
        ssl_keyfile=address.key,
    )


def serve(
    app: FastAPI, address: Address, connections: Connections, grace: float, announce: Callable[[str], None]
) -> None:
    """Serve `app` until SIGTERM or SIGINT; open answers then get `grace` seconds to finish.

    Args:
        app: what `prism_trt.frontend.service.create_app` made.
        address: where to listen.
        connections: limits them.
        grace: seconds.
        announce: told the URL once connections are accepted.

    Raises:
        PrismError: the address or the certificate cannot be used.
    """
    address.check_certificate()
    listener = Listener(address.bind(), connections)
    server = Server(configure(app, address, connections, grace), app, grace)
    # uvicorn raises the signals that it got once more when it has ended, and catches none before it has started.
    before = signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    try:
        scheme = "https" if address.certificate else "http"
        host = f"[{address.host}]" if ":" in address.host else address.host
        announce(f"{scheme}://{host}:{listener.getsockname()[1]}/v1")
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
