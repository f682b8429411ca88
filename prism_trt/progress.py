"""Progress on stderr: a bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 10.0


class Reporter(Protocol):
    """What the body of `progress` reports to."""

    def advance(self, amount: float = 1) -> None:
        """`amount` more of the total is done."""
        ...

    def describe(self, text: str) -> None:
        """Say what is being done now."""
        ...


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[Reporter]:
    """Show that work is going on; `total` None means that its amount is unknown."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(description, total)
        return
    text, count, time_spent = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(SpinnerColumn(), text, BarColumn(), count, time_spent, console=console) as bars:
        yield _Bar(bars, description, total)


def track(items: Iterable[Item], description: str, total: float | None = None) -> Iterator[Item]:
    """Yield `items`, showing progress; `total` None takes the length of `items` when it has one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(description, total) as reporter:
        for item in items:
            yield item
            reporter.advance()


class _Bar:
    def __init__(self, bars: Progress, description: str, total: float | None) -> None:
        self._bars = bars
        self._task = bars.add_task(description, total=total)

    def advance(self, amount: float = 1) -> None:
        self._bars.advance(self._task, amount)

    def describe(self, text: str) -> None:
        self._bars.update(self._task, description=text)


class _Lines:
    def __init__(self, description: str, total: float | None) -> None:
        self._description = description
        self._total = total
        self._done = 0.0
        self._start = self._last = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            amounts = f"{self._done:g}" if self._total is None else f"{self._done:g}/{self._total:g}"
            print(f"{self._description}: {amounts} after {now - self._start:.0f} s", file=sys.stderr, flush=True)

    def describe(self, text: str) -> None:
        self._description = text
