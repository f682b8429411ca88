"""Signals that interrupt, but not in the middle of an import."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]
_RETRY_SECONDS = 0.02


def outside_imports(handler: Handler) -> Handler:
    """A handler that calls `handler`, which may raise, once no import is under way in the main thread.

    Modules in C++ that import others abort the process when that raises, and numpy reports a broken installation.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if not _importing(frame):
            handler(number, frame)
            return
        main = threading.main_thread().ident
        retry = threading.Timer(_RETRY_SECONDS, signal.pthread_kill, (main, number))
        retry.daemon = True
        retry.start()

    return handle


@contextmanager
def interrupts_outside_imports() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt as usual, but in no import.

    A process that ignores or handles SIGINT otherwise is left alone.
    """
    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    signal.signal(signal.SIGINT, outside_imports(usual))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False
