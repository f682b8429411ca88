"""Calls recorded once per shape and then replayed, so that the host launches one graph instead of many kernels.

A recording reads its inputs from, and writes its outputs to, memory of its own: calls are padded to a few sizes
(buckets), their tensors copied in, and their outputs copied out. What records is a parameter: `record_cuda_graph` on a
GPU, `record_nothing` anywhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Recording:
    """A call that can be repeated."""

    replay: Callable[[], None]
    """Repeats the call on the tensors that it was recorded with."""
    outputs: Tensors
    """What `replay` writes."""


Record = Callable[[Callable[[], Tensors]], Recording]
"""Takes a call that always does the same to the same memory. It may be run several times while it is recorded."""


def record_nothing(call: Callable[[], Tensors]) -> Recording:
    """A `Record` for any device: its replays are the call itself."""
    outputs = call()

    def replay() -> None:
        for name, value in call().items():
            outputs[name].copy_(value)

    return Recording(replay, outputs)


class CudaGraphs:
    """A `Record` that captures CUDA graphs on the current device, which share the memory of their intermediates."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], Tensors]) -> Recording:
        """Run `call` on a stream of its own, as libraries allocate and choose kernels at first, then capture it."""
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            call()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = call()
        return Recording(graph.replay, outputs)


class Recordings:
    """Recordings by key and sizes; those longest unused are given up."""

    def __init__(self, record: Record, most: int = 128) -> None:
        """`most` recordings are kept."""
        self._record = record
        self._most = most
        self._kept: OrderedDict[Hashable, tuple[Tensors, Recording, object]] = OrderedDict()
        """The last is the recorded call, which owns what replays use."""

    def __len__(self) -> int:
        return len(self._kept)

    def run(
        self, key: Hashable, inputs: Tensors, make: Callable[[Tensors], Callable[[], Tensors]]
    ) -> dict[str, Tensor]:
        """The outputs of a call, which no later call overwrites.

        Args:
            key: calls with equal keys do the same with inputs of the same shapes and types.
            inputs: copied to the recording's own memory.
            make: gives the call over tensors like `inputs`; asked only when there is no recording yet.
        """
        whole = (key, *((name, value.shape, value.dtype) for name, value in inputs.items()))
        if whole in self._kept:
            self._kept.move_to_end(whole)
            memory, recording, _ = self._kept[whole]
            for name, value in inputs.items():
                memory[name].copy_(value)
        else:
            memory = {name: value.clone() for name, value in inputs.items()}
            call = make(memory)
            recording = self._record(call)
            self._kept[whole] = memory, recording, call
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        recording.replay()
        return {name: value.clone() for name, value in recording.outputs.items()}


def bucket(size: int, least: int, most: int) -> int | None:
    """The smallest of ``least, 2 least, 4 least, ..., most`` that holds `size`; None when none does."""
    if size > most:
        return None
    bucket = min(least, most)
    while bucket < size:
        bucket = min(2 * bucket, most)
    return bucket


def padded(value: Tensor, sizes: tuple[int | None, ...], filling: float = 0) -> Tensor:
    """`value` enlarged at the end of its first axes to `sizes` (None keeps an axis), the new part being `filling`."""
    shape = [size or old for size, old in zip(sizes, value.shape, strict=False)] + list(value.shape[len(sizes) :])
    if shape == list(value.shape):
        return value
    larger = value.new_full(shape, filling)
    larger[tuple(map(slice, value.shape))] = value
    return larger
