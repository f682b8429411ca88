"""A server that has something to do."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager

from prism_trt.client.generate import Options, stream_generate
from tests.deploy.conftest import SLOTS

LONG = 4000
"""Tokens that take more than a second."""


@contextmanager
def busy(url: str) -> Iterator[None]:
    """All slots are taken and as many requests wait: a further one gets no slot for seconds."""
    streams = [stream_generate(url, "fox", Options(max_tokens=LONG)) for _ in range(2 * SLOTS)]
    with ThreadPoolExecutor(len(streams)) as pool:
        begun = [pool.submit(next, stream) for stream in streams]
        while sum(future.done() for future in begun) < SLOTS:
            wait([future for future in begun if not future.done()], return_when=FIRST_COMPLETED)
        try:
            yield
        finally:
            for future in begun:
                future.add_done_callback(lambda future: streams[begun.index(future)].close())
