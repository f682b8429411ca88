"""A supervisor that a test watches from beside."""

from __future__ import annotations

import queue

from prism_trt.deploy.supervisor import Supervisor
from prism_trt.errors import PrismError


def run_to_the_end(supervisor: Supervisor, said: queue.Queue[str]) -> None:
    """Run it; why it gave up, if it does, comes last."""
    try:
        supervisor.run()
    except PrismError as error:
        said.put(str(error))
