"""The log, which no client can fill."""

from __future__ import annotations

import logging
import sys
import time


class Sparing(logging.Filter):
    """Lets every place in the code warn so often a minute only; what it says next tells how much was left out.

    Args:
        most: warnings and errors of one place within `seconds`.
        seconds: counted from the first of them.
    """

    def __init__(self, most: int = 20, seconds: float = 60.0) -> None:
        super().__init__()
        self._most = most
        self._seconds = seconds
        self._places: dict[tuple[str, int], tuple[float, int]] = {}
        """Since when is counted, and how many there were."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` is written."""
        if record.levelno < logging.WARNING:
            return True
        place = record.pathname, record.lineno
        now = time.monotonic()
        since, count = self._places.get(place, (now, 0))
        if now - since >= self._seconds:
            if (left_out := count - self._most) > 0:
                record.msg, record.args = f"{record.getMessage()} ({left_out} like this were left out)", None
            since, count = now, 0
        self._places[place] = since, count + 1
        return count < self._most


def log_to_stderr() -> None:
    """Write this process's log to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Sparing())
    logging.basicConfig(handlers=[handler], level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
