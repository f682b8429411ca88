"""Open connections: how many there may be, and how long one may keep the server waiting.

A connection waits for its client while no whole request header has come, between two requests, and while the client
reads nothing of its answer. One that waits too long is ended; when there are too many, the one that has waited longest
makes room for a new one. So connections that do nothing keep nobody out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from prism_trt.errors import PrismError

CLIENT_SECONDS = 20.0
"""Longest wait for a client."""
_PER_REQUEST = 4
_FEWEST = 256
_FEWEST_SECONDS = 0.1
"""What each client gets, however many there are."""
_CLOSING_SECONDS = 0.5
"""The event loop closes a connection sooner than that."""
_OTHER_FILES = 64
"""Descriptors for everything that is no client's connection."""
_FEWEST_FILES = 96

log = logging.getLogger(__name__)


def connections_for(requests: int) -> int:
    """How many connections there may be when `requests` may be open; raises the limit of open files for them.

    Raises:
        PrismError: hardly any fit under that limit.
    """
    wanted = max(_FEWEST, _PER_REQUEST * requests)
    files = _allow_files(wanted + _OTHER_FILES)
    if files < _FEWEST_FILES:
        raise PrismError(f"only {files} files may be open at once: allow more with ulimit -n")
    most = min(wanted, files - _OTHER_FILES)
    if most < wanted:
        log.warning("%d open files allow %d connections rather than %d: raise ulimit -n", files, most, wanted)
    return most


def _allow_files(wanted: int) -> int:
    """Let so many files be open at once, or as many as this process may allow itself; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    files = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    except (OSError, ValueError):
        return soft
    return files


class _Connection(socket.socket):
    """The socket of one client."""

    def __init__(self, descriptor: int, connections: Connections) -> None:
        super().__init__(fileno=descriptor)
        self._connections = connections
        self.transport: asyncio.Transport | None = None
        """None until HTTP can be spoken, after the TLS handshake."""

    def close(self) -> None:
        self._connections.forget(self)
        super().close()

    def end(self) -> None:
        """Have the event loop close it."""
        if self.transport is not None:
            self.transport.abort()
        # In the midst of TLS there is no transport yet, or it has let go.
        with contextlib.suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)


class Connections:
    """All open connections.

    Args:
        most: how many there may be.
        seconds: longest wait for a client.
    """

    def __init__(self, most: int, seconds: float = CLIENT_SECONDS) -> None:
        self._most = most
        self._seconds = seconds
        self._open: dict[int, _Connection] = {}
        """By descriptor."""
        self._waiting: dict[_Connection, float] = {}
        """Since when they wait for their clients; the longest first."""
        self._ending: set[_Connection] = set()
        self._ended = 0.0
        """When the last of these was told."""

    def __len__(self) -> int:
        return len(self._open)

    def add(self, accepted: socket.socket) -> _Connection:
        """Take over a connection that was just accepted."""
        connection = _Connection(accepted.detach(), self)
        self._open[connection.fileno()] = connection
        self.wait_for(connection)
        return connection

    def speaks_http(self, transport: asyncio.Transport) -> _Connection:
        """The connection of `transport`, which ends with it from now on."""
        connection = self._open[transport.get_extra_info("socket").fileno()]
        connection.transport = transport
        return connection

    def wait_for(self, connection: _Connection) -> None:
        """It is the client's turn."""
        self._waiting[connection] = time.monotonic()

    def work_for(self, connection: _Connection) -> None:
        """It is the server's turn."""
        self._waiting.pop(connection, None)

    def forget(self, connection: _Connection) -> None:
        """It is being closed."""
        self._open.pop(connection.fileno(), None)
        self._waiting.pop(connection, None)
        self._ending.discard(connection)

    @property
    def answering(self) -> int:
        """How many wait for the server rather than for their clients."""
        return len(self._open) - len(self._waiting) - len(self._ending)

    @property
    def full(self) -> bool:
        """Whether there may be no more."""
        return len(self._open) >= self._most

    def make_room(self) -> bool:
        """Whether there will be room in a moment: the connection that has waited longest is ended if need be."""
        now = time.monotonic()
        if self._ending and now - self._ended < _CLOSING_SECONDS:
            return True
        if not self._waiting:
            return False
        longest, since = next(iter(self._waiting.items()))
        if now - since >= _FEWEST_SECONDS:
            log.warning("%d connections are open: one that did nothing is closed for a new one", len(self))
            self._end(longest)
        return True

    async def end_idle(self) -> None:
        """End those whose clients have been waited for too long; to be called now and then."""
        latest = time.monotonic() - self._seconds
        for connection in [connection for connection, since in self._waiting.items() if since <= latest]:
            self._end(connection)

    def _end(self, connection: _Connection) -> None:
        self._waiting.pop(connection, None)
        self._ending.add(connection)
        self._ended = time.monotonic()
        connection.end()


class Listener(socket.socket):
    """A listening socket that accepts no more connections than there may be; for asyncio's own event loops.

    Args:
        listening: is taken over.
        connections: get the accepted ones.
    """

    def __init__(self, listening: socket.socket, connections: Connections) -> None:
        super().__init__(fileno=listening.detach())
        self._connections = connections

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection.

        Raises:
            BlockingIOError: there is none, or no room yet; the event loop comes back.
        """
        if self._connections.full:
            if not self._connections.make_room():
                log.warning(
                    "%d connections are open, and all are answered: a new one is closed", len(self._connections)
                )
                super().accept()[0].close()
            raise BlockingIOError
        accepted, address = super().accept()
        return self._connections.add(accepted), address


class Protocol(H11Protocol):
    """uvicorn's HTTP that says whose turn it is.

    Args:
        connections: told so.
        arguments: uvicorn's.
    """

    def __init__(self, *arguments: Any, connections: Connections, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self._all = connections
        self._answering = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connection = self._all.speaks_http(transport)

    def handle_events(self) -> None:
        super().handle_events()
        self._report()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._report()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._report()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._report()

    def _report(self) -> None:
        """Only changes count: a client that sends letter by letter is waited for all the same."""
        open_request = self.cycle is not None and not self.cycle.response_complete
        answering = open_request and not self.flow.write_paused
        if answering != self._answering and not self.transport.is_closing():
            self._answering = answering
            (self._all.work_for if answering else self._all.wait_for)(self._connection)
