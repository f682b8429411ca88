"""Readiness over HTTP: whether the model works, which Triton's own health endpoint does not know."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prism_trt.errors import PrismError

READY = "/ready"


class Readiness:
    """What `READY` answers: 200 without a problem, else 503 and the problem."""

    def __init__(self) -> None:
        self.problem: str | None = "the server is starting"


@contextmanager
def serve_readiness(readiness: Readiness, host: str, port: int) -> Iterator[str]:
    """Answer `READY` until the block ends; yields its URL.

    Raises:
        PrismError: the port cannot be used.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            problem = readiness.problem
            if self.path != READY:
                self._answer(404, f"only {READY} is here")
            else:
                self._answer(200 if problem is None else 503, problem or "ready")

        def _answer(self, status: int, text: str) -> None:
            body = f"{text}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Probes are no news."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise PrismError(
            f"port {port} cannot be used ({error.strerror}): choose another with --readiness-port"
        ) from None
    thread = threading.Thread(target=server.serve_forever, name="readiness", daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{port}{READY}"
    finally:
        server.shutdown()
        server.server_close()
