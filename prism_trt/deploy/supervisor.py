"""Keeps a server serving: a canary watches its model, and a server that dies or hangs is replaced by a fresh one."""

from __future__ import annotations

import time
from collections.abc import Callable

from pydantic import Field

from prism_trt.config import StrictModel
from prism_trt.deploy.readiness import Readiness
from prism_trt.deploy.server import LOG_FOLLOWS, TritonServer
from prism_trt.errors import PrismError


class Supervision(StrictModel):
    """How a server is watched; times are in seconds."""

    canary_interval: float = Field(10.0, gt=0, description="between two canaries")
    canary_patience: float = Field(20.0, gt=0, description="until a canary must have been answered")
    hang_timeout: float = Field(
        60.0, gt=0, description="without an answered canary, after which the server is replaced"
    )
    restarts: int = Field(5, ge=0, description="in a row before giving up")
    first_delay: float = Field(1.0, gt=0, description="before the first restart in a row; doubles with each")
    longest_delay: float = Field(30.0, gt=0, description="before a restart")
    stable_seconds: float = Field(600.0, gt=0, description="after which a server that ran begins a new row of restarts")

    def delay(self, restart: int) -> float:
        """Seconds to wait before restart number `restart` of a row, from 1."""
        return min(self.longest_delay, self.first_delay * 2 ** (restart - 1))


class Supervisor:
    """Watches a server that has been started, until it is stopped.

    Requests that run on a server when it dies or is replaced end with an error at once: their connections close.

    Args:
        server: keeps its ports over restarts.
        readiness: told whether the model works.
        say: prints one line.
    """

    def __init__(
        self, server: TritonServer, supervision: Supervision, readiness: Readiness, say: Callable[[str], None]
    ) -> None:
        self._server = server
        self._supervision = supervision
        self._readiness = readiness
        self._say = say

    def run(self) -> None:
        """Watch and replace until somebody stops the server.

        Raises:
            PrismError: it has been replaced as often as allowed.
        """
        restarts = 0
        while True:
            began = time.monotonic()
            try:
                if restarts:
                    self._server.start()
                    self._readiness.problem = None
                    self._say(f"serving again after {time.monotonic() - began:.1f} s")
                self._watch()
                return
            except PrismError as error:
                self._readiness.problem = _first_line(error)
                problem = str(error)
                self._server.stop(now=True)
                if time.monotonic() - began > self._supervision.stable_seconds:
                    restarts = 0
                if restarts == self._supervision.restarts:
                    raise
            restarts += 1
            delay = self._supervision.delay(restarts)
            self._say(f"restart {restarts} of {self._supervision.restarts} in {delay:g} s: {problem}")
            time.sleep(delay)

    def _watch(self) -> None:
        """Return when the server has been stopped.

        A model that somebody has unloaded is not ready, but no reason to replace the server.

        Raises:
            PrismError: it has ended, or no canary was answered for too long.
        """
        heard = time.monotonic()
        while not self._server.wait(self._supervision.canary_interval):
            try:
                self._server.probe(self._supervision.canary_patience)
            except PrismError as error:
                absence = self._server.absence()
                self._readiness.problem = absence or _first_line(error)
                if absence is not None:
                    heard = time.monotonic()
                silent = time.monotonic() - heard
                if silent > self._supervision.hang_timeout:
                    raise PrismError(f"the model has not worked for {silent:.0f} s: {error}") from None
            else:
                self._readiness.problem = None
                heard = time.monotonic()


def _first_line(error: PrismError) -> str:
    """The sentence without the lines of a log that follow it."""
    return str(error).splitlines()[0].removesuffix(LOG_FOLLOWS)
