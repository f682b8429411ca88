"""The server's Prometheus metrics; imported inside Triton's model process only.

Every change of a metric is a message to the server, as costly as a response. So times are observed once per request or
round, and what a request did is counted when it has ended.
"""

from __future__ import annotations

from typing import Any, get_args

import triton_python_backend_utils as pb_utils

from prism_trt.deploy.scheduler import Cause, Occupancy
from prism_trt.speculative.request import Statistics
from prism_trt.speculative.stopping import FinishReason

_WAIT_BUCKETS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]
"""Seconds."""
_GAP_BUCKETS = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]
"""Seconds."""


class _Family:
    """Metrics of one name, by the values of their labels."""

    def __init__(self, kind: str, name: str, description: str, buckets: list[float] | None = None) -> None:
        # Metrics stop working when their family is collected.
        self._family = pb_utils.MetricFamily(
            name=name, description=description, kind=getattr(pb_utils.MetricFamily, kind)
        )
        self._options = {} if buckets is None else {"buckets": buckets}
        self._metrics: dict[tuple[str, ...], Any] = {}

    def __call__(self, **labels: str) -> Any:
        key = tuple(labels.values())
        if key not in self._metrics:
            self._metrics[key] = self._family.Metric(labels=labels, **self._options)
        return self._metrics[key]


class TritonMonitor:
    """A `Monitor` on Triton's metrics page."""

    def __init__(self) -> None:
        self._queue = _Family("HISTOGRAM", "prism_queue_seconds", "Wait for a slot", _WAIT_BUCKETS)
        self._first_token = _Family(
            "HISTOGRAM", "prism_first_token_seconds", "Time to the first token, wait included", _WAIT_BUCKETS
        )
        self._inter_token = _Family(
            "HISTOGRAM", "prism_inter_token_seconds", "Time between the tokens of two rounds", _GAP_BUCKETS
        )
        self._prompt = _Family("COUNTER", "prism_prompt_tokens_total", "Prompt tokens")
        self._reused = _Family("COUNTER", "prism_prefix_hit_tokens_total", "Prompt tokens whose K/V were cached")
        self._output = _Family("COUNTER", "prism_output_tokens_total", "Tokens generated")
        self._passes = _Family("COUNTER", "prism_target_passes_total", "Target passes after the prefill, by draft tree")
        self._accepted = _Family("COUNTER", "prism_accepted_draft_tokens_total", "Drafted tokens accepted, by step")
        self._finished = _Family("COUNTER", "prism_finished_requests_total", "Requests that ended well, by reason")
        self._failed = _Family("COUNTER", "prism_failed_requests_total", "Requests that ended without their answer")
        self._requests = _Family("GAUGE", "prism_requests", "Requests that run and that wait")
        self._slots = _Family("GAUGE", "prism_kv_slots", "Slots of the K/V pool: used, cached for reuse, or empty")
        # A counter that is not on the page before its first event has no rate at that event.
        for cause in get_args(Cause):
            self._failed(cause=cause)
        self._accepted(step="0")

    def occupancy(self, occupancy: Occupancy) -> None:
        """See `Monitor`."""
        self._requests(state="running").set(occupancy.running)
        self._requests(state="waiting").set(occupancy.waiting)
        self._slots(state="used").set(occupancy.running)
        self._slots(state="cached").set(occupancy.cached_slots)
        self._slots(state="empty").set(occupancy.empty_slots)

    def started(self, waited: float) -> None:
        """See `Monitor`."""
        self._queue().observe(waited)

    def first_token(self, waited: float) -> None:
        """See `Monitor`."""
        self._first_token().observe(waited)

    def round(self, gap: float) -> None:
        """See `Monitor`."""
        self._inter_token().observe(gap)

    def finished(self, reason: FinishReason, statistics: Statistics) -> None:
        """See `Monitor`."""
        self._finished(reason=reason).increment(1)
        self._prompt().increment(statistics.num_input_tokens)
        self._reused().increment(statistics.reused_tokens)
        self._output().increment(statistics.num_output_tokens)
        for tree, passes in statistics.passes_by_tree.items():
            self._passes(tree=str(tree or "none")).increment(passes)
        for step, passes in enumerate(statistics.accepted_by_step):
            self._accepted(step=str(step)).increment(passes)

    def failed(self, cause: Cause) -> None:
        """See `Monitor`."""
        self._failed(cause=cause).increment(1)
