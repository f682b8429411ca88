"""Memory bandwidth of the host, measured beside every figure because decoding at batch 1 is bound by it."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from prism_trt.engines.loading import default_threads, torch_threads

BYTES = 1 << 28


class BandwidthProbe:
    """Reads a 256 MiB buffer with all processors; the buffer is allocated once and is larger than any cache."""

    def __init__(self) -> None:
        self._buffer: Tensor = torch.ones(BYTES // 4, dtype=torch.float32)

    def measure(self, repeats: int = 3) -> float:
        """Median GB/s (1e9 bytes) of `repeats` sums over the buffer."""
        rates = []
        with torch_threads(default_threads()):
            for _ in range(repeats):
                start = time.perf_counter()
                self._buffer.sum()
                rates.append(BYTES / (time.perf_counter() - start) / 1e9)
        return statistics.median(rates)
