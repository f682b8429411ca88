"""The latency table of an engine: times of calls by requests and tokens, in a few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from prism_trt.config import TreeShape
from prism_trt.engines.latency import LatencyTable
from prism_trt.engines.protocol import Engine, PrefixCopyEngine, TokenBatch, draft_vocab_size
from prism_trt.speculative.tree import grow_tree

_CONTEXT = 128
_MOST_REQUESTS = 64
_TOKENS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 60)
_WIDTHS = (1, 2, 4, 8)
_DEPTHS = (1, 5)
_PENDING = 2
"""Committed tokens of each request that a draft round starts with."""
_REPEATS = 3


@dataclass(frozen=True)
class _Call:
    requests: int
    size: int | TreeShape | Literal["extend"]
    """Tokens of each request, the tree that is drafted, or the drafter's extension over the context."""
    work: int
    """Tokens that pass through the networks, for their order."""
    run: Callable[[], object]


def measure(engine: Engine, seconds: float = 6.0) -> LatencyTable:
    """Time target passes and draft rounds of 1, 2, 4, ... requests with a quarter of the context (at most 128) each.

    The calls are repeated in turn, so that a passing disturbance hits one sample of each; the shortest counts.

    Args:
        seconds: limit, to within a few calls and a prefill. The largest calls are left out where the first samples
            would take more than half of it; repetitions end with it.
    """
    context = max(1, min(_CONTEXT, engine.limits.context // 4, engine.limits.tokens_per_call))
    counts = request_counts(min(engine.limits.slots, _MOST_REQUESTS))
    features = _fill(engine, counts[-1], context)
    start = time.perf_counter()
    calls = [call for requests in counts for call in _calls(engine, requests, context, features[:, -1:])]
    if engine.has_drafter:
        calls.append(_Call(1, "extend", context, partial(engine.extend, _batch(engine, 1, context, 0), features)))
    calls.sort(key=lambda call: call.work)
    samples = _sample(engine.device, calls, start + seconds / 2, start + seconds)
    extend = 0.0
    forward: dict[int, dict[int, float]] = {}
    rounds: dict[int, dict[str, float]] = {}
    for call, times in samples:
        ms = round(min(times), 4)  # whatever else runs here only ever lengthens a call
        if call.size == "extend":
            extend = ms / context
        elif isinstance(call.size, int):
            forward.setdefault(call.requests, {})[call.size] = ms
        else:
            rounds.setdefault(call.requests, {})[str(call.size)] = ms
    return LatencyTable(context=context, forward=forward, draft_round=rounds, extend=extend)


def _fill(engine: Engine, slots: int, length: int) -> Tensor:
    """Give each slot K/V that calls can read, as unwritten memory may be cheaper; returns features [1, T, F]."""
    features = engine.forward(_batch(engine, 1, length, 0), "none").features
    copying = engine if isinstance(engine, PrefixCopyEngine) else None
    for slot in range(1, slots):
        if copying is not None:
            copying.copy_prefix(0, slot, length)
        else:
            engine.forward(_batch(engine, 1, length, 0, slot), "none")
    return features


def request_counts(most: int) -> list[int]:
    """1, 2, 4, ..., `most`."""
    return [1 << i for i in range(most.bit_length()) if 1 << i < most] + [most]


def _calls(engine: Engine, requests: int, context: int, newest: Tensor) -> Iterator[_Call]:
    """The calls to time for so many requests; `newest` [1, 1, F] are features to draft from."""
    limits = engine.limits
    for tokens in _TOKENS:
        if requests * tokens <= limits.tokens_per_call and context + tokens <= limits.context:
            batch = _batch(engine, requests, tokens, context)
            yield _Call(requests, tokens, requests * tokens, partial(engine.forward, batch, "all"))
    if not engine.has_drafter:
        return
    words = draft_vocab_size(engine)
    pending = _batch(engine, requests, _PENDING, context)
    features = newest.expand(requests, _PENDING, -1).contiguous()
    for width in _WIDTHS:
        fits = requests * max(width, _PENDING) <= limits.tokens_per_call
        if width <= words and fits and context + _PENDING + width * (_DEPTHS[-1] - 1) <= limits.context:
            for depth in _DEPTHS:
                shape = TreeShape(depth=depth, width=width, size=width + 1)
                run = partial(grow_tree, engine, pending, features, shape)
                yield _Call(requests, shape, requests * width * depth, run)


def _batch(engine: Engine, requests: int, tokens: int, length: int, first_slot: int = 0) -> TokenBatch:
    """Token 0 over and over, behind `length` committed entries of consecutive slots."""
    slots = torch.arange(first_slot, first_slot + requests, device=engine.device)
    lengths = torch.full_like(slots, length)
    positions = lengths[:, None] + torch.arange(tokens, device=engine.device)
    return TokenBatch(torch.zeros_like(positions), positions, slots, lengths, torch.full_like(slots, tokens))


def _sample(
    device: torch.device, calls: list[_Call], enough: float, deadline: float
) -> list[tuple[_Call, list[float]]]:
    """Milliseconds of each call, in turn.

    Args:
        calls: those of one request are sampled whatever the time is.
        enough: when (`time.perf_counter`) no further calls are taken up.
        deadline: when repetitions end.
    """
    samples: list[tuple[_Call, list[float]]] = []
    for call in calls:
        if call.requests == 1 or time.perf_counter() < enough:
            samples.append((call, [_milliseconds(device, call)]))
    for _ in range(_REPEATS - 1):
        for call, times in samples:
            if time.perf_counter() < deadline:
                times.append(_milliseconds(device, call))
    return samples


def _milliseconds(device: torch.device, call: _Call) -> float:
    start = time.perf_counter()
    call.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3
