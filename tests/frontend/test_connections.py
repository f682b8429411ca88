"""Connections whose clients do nothing, and the log that they could fill."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
import uvicorn
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from prism_trt.deploy.server import free_port
from prism_trt.errors import PrismError
from prism_trt.frontend import connections as limits
from prism_trt.frontend.connections import Connections, Listener, connections_for
from prism_trt.frontend.logs import Sparing
from prism_trt.frontend.server import Address, configure
from tests.frontend.conftest import running

LARGE = 16 << 20
"""Bytes; more than kernels buffer."""


def application() -> FastAPI:
    app = FastAPI()

    @app.get("/live")
    async def live() -> str:
        return "live"

    @app.post("/early")
    async def early() -> str:
        return "answered before the body was read"

    @app.get("/slow")
    async def slow() -> str:
        await asyncio.sleep(4)
        return "slow"

    @app.get("/large")
    async def large() -> PlainTextResponse:
        return PlainTextResponse("x" * LARGE)

    return app


@contextmanager
def serving(connections: Connections, certificate: tuple[Path, Path] | None = None) -> Iterator[int]:
    """The port of a server in a thread."""
    address = Address(port=0, certificate=certificate and certificate[0], key=certificate and certificate[1])
    listener = Listener(address.bind(), connections)
    port = listener.getsockname()[1]
    server = uvicorn.Server(configure(application(), address, connections, grace=0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield port
    finally:
        server.should_exit = True
        thread.join()


def connect(port: int, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(sent)
    return connection


def closed(connection: socket.socket, seconds: float) -> bool:
    """Whether the other side closes it in time; what it says before does not matter."""
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def answered(connection: socket.socket) -> bool:
    """Whether what /slow says comes."""
    said = b""
    while b'"slow"' not in said and (more := connection.recv(65536)):
        said += more
    return b'"slow"' in said


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def live(port: int, **options: Any) -> int:
    scheme = "https" if options else "http"
    return httpx.get(f"{scheme}://localhost:{port}/live", timeout=10, **options).status_code


GET = b"GET /%s HTTP/1.1\r\nHost: a\r\n\r\n"
IDLE: dict[str, bytes] = {
    "nothing": b"",
    "half a header": b"GET /live HTTP/1.1\r\nHost: a\r\n",
    "the answer's body is never asked for": b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nx",
    "half a header after a request": GET % b"live" + b"GET /live HTTP/1.1\r\n",
}


def test_clients_are_waited_for_so_long_only() -> None:
    connections = Connections(100, seconds=1.0)
    with serving(connections) as port, ExitStack() as stack:
        slow = stack.enter_context(connect(port, GET % b"slow"))
        waiting = {name: stack.enter_context(connect(port, sent)) for name, sent in IDLE.items()}
        trickling = stack.enter_context(connect(port, b"GET /live HTTP/1.1\r\n"))
        unread = stack.enter_context(connect(port, GET % b"large"))
        ended = time.monotonic() + 8
        with pytest.raises(OSError):
            while time.monotonic() < ended:
                trickling.sendall(b"a: b\r\n")
                time.sleep(0.1)
        for name, connection in waiting.items():
            assert closed(connection, 5), name
        # Who waits for the server has all the time that this takes.
        assert answered(slow)
        assert closed(slow, 10)
        wait_for(lambda: len(connections) == 0)
        assert closed(unread, 5)
        assert live(port) == 200


def test_connections_that_do_nothing_make_room() -> None:
    connections = Connections(8)
    with serving(connections) as port, ExitStack() as stack:
        slow = stack.enter_context(connect(port, GET % b"slow"))
        wait_for(lambda: connections.answering == 1)
        idle = [stack.enter_context(connect(port)) for _ in range(30)]
        assert live(port) == 200
        assert len(connections) <= 8
        assert closed(idle[0], 5)
        assert not closed(idle[-1], 0.2)
        assert answered(slow)


def test_when_all_are_answered_new_ones_are_closed() -> None:
    connections = Connections(3)
    with serving(connections) as port, ExitStack() as stack:
        slow = [stack.enter_context(connect(port, GET % b"slow")) for _ in range(3)]
        wait_for(lambda: connections.answering == 3)
        assert closed(stack.enter_context(connect(port, GET % b"live")), 3)
        assert all(answered(connection) for connection in slow)
        assert live(port) == 200


def test_tls_that_never_begins(tmp_path: Path) -> None:
    authority = trustme.CA()
    paths = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate = authority.issue_cert("localhost")
    certificate.cert_chain_pems[0].write_to_path(str(paths[0]))
    certificate.private_key_pem.write_to_path(str(paths[1]))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with serving(Connections(8, seconds=2.0), paths) as port, ExitStack() as stack:
        # Before the handshake, and after it.
        idle = [stack.enter_context(connect(port)) for _ in range(20)]
        assert live(port, verify=context) == 200
        assert closed(idle[0], 1)
        secret = stack.enter_context(context.wrap_socket(connect(port), server_hostname="localhost"))
        assert live(port, verify=context) == 200
        assert closed(secret, 8)
        assert closed(idle[-1], 8)


def test_idle_connections_neither_stop_the_front_end_nor_fill_its_log() -> None:
    with running(f"127.0.0.1:{free_port()}", open_files=120) as frontend, ExitStack() as stack:
        port = int(frontend.url.split(":")[2].removesuffix("/v1"))
        for _ in range(150):
            stack.enter_context(connect(port))
        for _ in range(3):
            assert frontend.health("live") == 200
            time.sleep(0.5)
        log = frontend.stop()
    assert "120 open files allow 56 connections rather than 1024: raise ulimit -n" in log
    assert "out of system resource" not in log
    assert log.count("\n") < 30


def test_the_limit_of_open_files_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = [0, 0]
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: tuple(limit))
    monkeypatch.setattr(limits.resource, "setrlimit", lambda _, new: limit.__setitem__(slice(2), new))
    for soft, hard, requests, most, files in (
        (1024, 4096, 256, 1024, 1088),
        (1024, 4096, 10, 256, 1024),
        (120, 120, 256, 56, 120),
        (1024, resource.RLIM_INFINITY, 5000, 20_000, 20_064),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 256, 1024, resource.RLIM_INFINITY),
    ):
        limit[:] = soft, hard
        assert connections_for(requests) == most
        assert limit == [files, hard]
    limit[:] = 64, 64
    with pytest.raises(PrismError, match="only 64 files may be open at once: allow more with ulimit -n"):
        connections_for(256)


def test_the_log_is_not_flooded() -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(Sparing(most=3, seconds=0.5))
    logger = logging.Logger("flood")
    logger.addHandler(handler)

    def flood(count: int) -> None:
        for number in range(count):
            logger.error("failed %d", number)

    flood(1000)
    assert lines == ["failed 0", "failed 1", "failed 2"]
    logger.error("something else")
    for number in range(10):
        logger.info("done %d", number)
    assert len(lines) == 3 + 1 + 10
    time.sleep(0.6)
    flood(2)
    assert lines[-2:] == ["failed 0 (997 like this were left out)", "failed 1"]
