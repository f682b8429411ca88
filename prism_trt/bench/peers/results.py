"""The peers' JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from prism_trt.bench.peers.timing import Timing
from prism_trt.bench.results import Bandwidth, EngineInfo, Environment, Interval
from prism_trt.bench.statistics import Draws, bounds, divide, draw_questions, pooled_ratio
from prism_trt.config import StrictModel


class PeerRecord(StrictModel):
    """One contestant over all prompts."""

    name: str
    version: str
    decode_tps: tuple[float, ...] = Field(description="per prompt, without prefill")
    median_tps: float
    pooled_tps: float
    ratio: float = Field(description="pooled tokens per second of the base contestant / of this one")
    ratio_interval: Interval = Field(description="95 % bootstrap interval over prompts")
    pass_ms: dict[str, float] = Field(description="median milliseconds of one pass over so many tokens after so many")
    same_output: float = Field(description="share of prompts answered with the base contestant's tokens")


class PeersResult(StrictModel):
    """One interleaved run of all contestants; the first one is the base of the ratios."""

    kind: Literal["peers"] = "peers"
    format: Literal[2] = 2
    engine: EngineInfo
    environment: Environment
    bandwidth_gb_s: Bandwidth
    prompts: int
    tokens: int
    peers: tuple[PeerRecord, ...]


def compare(
    names: Sequence[str],
    versions: Sequence[str],
    timings: Sequence[Sequence[Timing]],
    pass_ms: Sequence[dict[str, float]],
    samples: int = 2000,
    seed: int = 0,
) -> tuple[PeerRecord, ...]:
    """Records of contestants from `timings[contestant][prompt]`, each compared with contestant 0.

    Args:
        pass_ms: of each contestant, see `PeerRecord.pass_ms`.
    """
    draws = Draws(draw_questions(["prompts"] * len(timings[0]), samples, seed), np.ones((1 + samples, 1)))
    pooled = [
        pooled_ratio(
            np.array([[len(entry.tokens) - 1.0 for entry in runs]]),
            np.array([[entry.decode_seconds for entry in runs]]),
            draws,
        )
        for runs in timings
    ]
    records = []
    for index, runs in enumerate(timings):
        rates = tuple(entry.decode_tps for entry in runs)
        ratio = bounds(divide(pooled[0], pooled[index]))
        assert ratio is not None
        records.append(
            PeerRecord(
                name=names[index],
                version=versions[index],
                decode_tps=rates,
                median_tps=statistics.median(rates),
                pooled_tps=float(pooled[index][0]),
                ratio=ratio[0],
                ratio_interval=Interval(low=ratio[1], high=ratio[2]),
                pass_ms=pass_ms[index],
                same_output=sum(a.tokens == b.tokens for a, b in zip(runs, timings[0], strict=True)) / len(runs),
            )
        )
    return tuple(records)
