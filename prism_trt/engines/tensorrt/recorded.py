"""Networks whose short calls are recorded: padded to a few sizes, with the K/V pool bound in place.

Only tokens, picked tokens and live entries are padded. Rows are not: a recording is bound to the memory of its slots.
Padding tokens write behind the row's own, where no later call reads before it writes; the pool has room for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from prism_trt.engines.recordings import Record, Recordings, Tensors, bucket, padded
from prism_trt.engines.tensorrt.binding import NetworkLimits
from prism_trt.engines.tensorrt.engine import Executable
from prism_trt.engines.tensorrt.files import before_update
from prism_trt.engines.tensorrt.names import (
    CALL_TOKENS,
    FEATURES,
    GREEDY,
    HIDDEN,
    IN_FLIGHT,
    LENGTHS,
    LIVE,
    LOGITS,
    MASK,
    MASKED,
    NEXT_HIDDEN,
    PICKED,
    PICKED_TOKENS,
    POSITIONS,
    SLOTS,
    STEP,
    TOKENS,
    TREE,
    WRITE_INDEX,
)

_LEAST_LIVE = 256

_INPUTS: Mapping[str, tuple[str | None, ...]] = {
    TOKENS: (None, CALL_TOKENS),
    POSITIONS: (None, CALL_TOKENS),
    WRITE_INDEX: (),
    MASK: (None, None, CALL_TOKENS, LIVE),
    PICKED: (None, PICKED_TOKENS),
    HIDDEN: (None, CALL_TOKENS),
    STEP: (None, CALL_TOKENS),
    SLOTS: (),
    LENGTHS: (),
    TREE: (None, CALL_TOKENS, IN_FLIGHT),
}
"""Dimensions of the first axes, those that are padded; what is not here is the pool."""
_OUTPUTS = {FEATURES: CALL_TOKENS, LOGITS: PICKED_TOKENS, GREEDY: PICKED_TOKENS, NEXT_HIDDEN: PICKED_TOKENS}
"""What the second axis of an output is, where it is padded."""

Sizes = dict[str, int]
"""Sizes of dimensions by their names."""


def sizes_of(inputs: Tensors) -> Sizes:
    """Sizes of the dimensions of a call that can be padded."""
    return {
        dimension: inputs[name].shape[axis]
        for name, dimensions in _INPUTS.items()
        if name in inputs and inputs[name].dim() >= len(dimensions)
        for axis, dimension in enumerate(dimensions)
        if dimension is not None
    }


def padded_sizes(sizes: Sizes, limits: NetworkLimits) -> Sizes | None:
    """The sizes of the recording for a call; None when it is too long to be recorded."""
    tokens = bucket(sizes[CALL_TOKENS], 1, limits.shared_tokens)
    if tokens is None:
        return None
    larger = {**sizes, CALL_TOKENS: tokens}
    if sizes[PICKED_TOKENS] > 1:  # those of a row's last token alone stay one
        larger[PICKED_TOKENS] = tokens
    if LIVE in sizes:
        live = bucket(sizes[LIVE], _LEAST_LIVE, limits.context)
        assert live is not None, "the context was checked when the call was made"
        larger[LIVE] = live
    if IN_FLIGHT in sizes:  # its excess over the tokens says where these are written
        larger[IN_FLIGHT] = sizes[IN_FLIGHT] + tokens - sizes[CALL_TOKENS]
    return larger


class RecordedNetwork:
    """An `Executable` over another one that replays recordings of its short calls."""

    def __init__(
        self, network: Executable, fresh: Callable[[], Executable], limits: NetworkLimits, record: Record
    ) -> None:
        """Start without recordings.

        Args:
            network: runs long calls.
            fresh: gives an executable of the same network for one recording alone.
            limits: what the network was built for.
            record: records a call.
        """
        self._network = network
        self._fresh = fresh
        self._limits = limits
        self.recordings = Recordings(record)

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `prism_trt.engines.tensorrt.engine.Executable.run`."""
        sizes = sizes_of(inputs)
        larger = padded_sizes(sizes, self._limits)
        if larger is None:
            return self._network.run(inputs)
        own = {name: _padded(name, value, larger) for name, value in inputs.items() if name in _INPUTS}
        pool = {name: value for name, value in inputs.items() if name not in _INPUTS}
        where = tuple(value.data_ptr() for value in pool.values())

        def make(memory: Tensors) -> Callable[[], Tensors]:
            return partial(_computed, self._fresh(), {**memory, **pool})

        outputs = self.recordings.run(where, own, make)
        return {name: _trimmed(name, value, sizes) for name, value in outputs.items()}


def _computed(network: Executable, inputs: dict[str, Tensor]) -> Tensors:
    """The network's outputs but for the pool, which is where it was."""
    return {name: value for name, value in network.run(inputs).items() if before_update(name) not in inputs}


def _padded(name: str, value: Tensor, sizes: Sizes) -> Tensor:
    dimensions = _INPUTS[name]
    if value.dim() < len(dimensions):  # the step of all tokens at once
        return value
    wanted = tuple(None if dimension is None else sizes[dimension] for dimension in dimensions)
    return padded(value, wanted, MASKED if name == MASK else 0)


def _trimmed(name: str, value: Tensor, sizes: Sizes) -> Tensor:
    return value[:, : sizes[_OUTPUTS[name]]] if name in _OUTPUTS else value
