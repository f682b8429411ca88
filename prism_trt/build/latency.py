"""The latency table of an engine: medians of a few calls at a fixed context."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from prism_trt.config import TreeShape
from prism_trt.engines.manifest import LatencyTable
from prism_trt.engines.protocol import Engine, FusedDraftEngine, TokenBatch

_TOKENS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
_TREES = ("4/1/3", "6/1/5", "8/4/4", "8/4/5", "12/4/5", "16/4/6", "32/8/6", "60/10/6")
_REPEATS = 7


def _median_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(times), 4)


def _batch(tokens: int, length: int) -> TokenBatch:
    return TokenBatch.one_row(torch.zeros(tokens, dtype=torch.int64), length)


def measure(engine: Engine) -> LatencyTable:
    """Time target passes and draft rounds of one request with a quarter of the context (at most 256) committed."""
    context = min(256, engine.limits.context // 4)
    chunk = min(context, engine.limits.tokens_per_call)
    prompt = _batch(chunk, 0)
    features = engine.forward(prompt, "none").features
    room = min(engine.limits.tokens_per_call, engine.limits.context - context)
    forward = {}
    for tokens in _TOKENS:
        if tokens <= room:
            forward[tokens] = _median_ms(partial(engine.forward, _batch(tokens, chunk), "all"))
    rounds = {}
    if isinstance(engine, FusedDraftEngine) and engine.has_drafter:
        engine.extend(prompt, features)
        for tree in _TREES:
            shape = TreeShape.parse(tree)
            drafted = shape.width * (shape.depth - 1) + 2
            if drafted <= room:
                newest = features[:, :2].contiguous()
                rounds[tree] = _median_ms(partial(engine.draft_round, _batch(2, chunk), newest, shape))
    return LatencyTable(context=chunk, forward=forward, draft_round=rounds)
