"""From batches of the engine protocol to the input tensors of networks.

A network sees the pool rows of consecutive slots, so a call covers every slot from the first to the last one that its
batch names; the slots between them that are not in the batch are idle rows. An idle row writes its K/V at entry
``context``, where the pool has room that belongs to nobody; so do the padding tokens of a row at its context's end.
Networks with plugins see the whole pool and the slots of their rows, and have no idle rows.

Shape legend: as in `prism_trt.engines.tensorrt.names`; b rows of the batch, B >= b rows of the call, N slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prism_trt.engines.protocol import EngineLimits, TokenBatch
from prism_trt.engines.tensorrt.names import (
    LENGTHS,
    MASK,
    MASKED,
    POSITIONS,
    SLOTS,
    TOKENS,
    TREE,
    WRITE_INDEX,
    cache_names,
)
from prism_trt.errors import PrismError
from prism_trt.target.model import KVPool


@dataclass(frozen=True)
class NetworkLimits:
    """What networks are built for: calls of one row, and shared calls of several."""

    slots: int
    """Rows of a shared call."""
    context: int
    """K/V entries that a request may use."""
    prefill_tokens: int
    """Tokens of a call with one row."""
    shared_tokens: int
    """Tokens per row of a call with several rows; at least the size of the largest tree."""

    @property
    def capacity(self) -> int:
        """Entries of a slot: the context, and room for what idle rows and padding write."""
        return self.context + self.shared_tokens

    @property
    def engine(self) -> EngineLimits:
        """The limits as the decoding loop knows them."""
        return EngineLimits(
            slots=self.slots, context=self.context, tokens_per_call=max(self.prefill_tokens, self.shared_tokens)
        )


@dataclass(frozen=True)
class Call:
    """One network call: some rows of a batch at their places among consecutive slots."""

    batch: TokenBatch
    """[b, T]: the rows of the call."""
    indices: Tensor
    """[b] int64: the rows of the original batch."""
    places: Tensor
    """[b] int64: the call's rows that are not idle."""
    first_slot: int
    """Of the consecutive slots covered."""
    rows: int
    """B."""
    live: int
    """L: entries that any query may read, of any row."""

    def spread(self, values: Tensor, idle: int = 0) -> Tensor:
        """[B, ...] of values [b, ...] of the batch's rows; idle rows get the number `idle`."""
        if self.rows == 1:
            return values
        spread = values.new_full((self.rows, *values.shape[1:]), idle)
        spread[self.places] = values
        return spread


def calls_of(batch: TokenBatch, limits: NetworkLimits, idle_rows: bool = True) -> Iterator[Call]:
    """Cut a batch into network calls: one for all rows when they are short enough, otherwise one per row.

    With `idle_rows`, a call's rows are consecutive slots; without, they are the batch's.

    Raises:
        PrismError: a call exceeds the limits.
        ValueError: two rows share a slot, or a slot does not exist.
    """
    rows, tokens = batch.tokens.shape
    if rows * tokens > limits.engine.tokens_per_call:
        raise PrismError(
            f"the call has {rows * tokens} tokens but the engine's limit is {limits.engine.tokens_per_call}: send them "
            "in smaller chunks"
        )
    table = torch.stack((batch.slots, batch.lengths, batch.counts))  # one transfer from the device, not three
    slots, lengths, counts = table.tolist()
    if len(set(slots)) < rows:
        raise ValueError(f"two rows of a call share a slot: {slots}")
    if min(slots) < 0 or max(slots) >= limits.slots:
        raise ValueError(f"the engine has {limits.slots} slots, but a call names the slots {slots}")
    ends = [batch.offset + length + count for length, count in zip(lengths, counts, strict=True)]
    if max(ends) > limits.context:
        raise PrismError(
            f"the call needs {max(ends)} K/V entries but the context has {limits.context}: shorten the prompt or build "
            "the engine with a larger context"
        )
    everything = torch.arange(rows, device=batch.tokens.device)
    if tokens <= limits.shared_tokens:
        if idle_rows:
            first = min(slots)
            yield Call(batch, everything, batch.slots - first, first, max(slots) - first + 1, max(ends))
        else:
            yield Call(batch, everything, everything, 0, rows, max(ends))
        return
    for row in range(rows):
        alone = slice(row, row + 1)
        yield Call(_row(batch, row, counts[row]), everything[alone], everything[:1], slots[row], 1, ends[row])


def _row(batch: TokenBatch, row: int, count: int) -> TokenBatch:
    """One row without its padding."""
    alone = slice(row, row + 1)
    return replace(
        batch,
        tokens=batch.tokens[alone, :count],
        positions=batch.positions[alone, :count],
        slots=batch.slots[alone],
        lengths=batch.lengths[alone],
        counts=batch.counts[alone],
        mask=None if batch.mask is None else batch.mask[alone, :count, : batch.offset + count],
    )


def common_inputs(call: Call, limits: NetworkLimits, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tokens, positions, write indices and mask of a call."""
    batch = call.batch
    return {
        TOKENS: call.spread(batch.tokens).to(torch.int32),
        POSITIONS: call.spread(batch.positions).to(torch.int32),
        WRITE_INDEX: call.spread(batch.lengths + batch.offset, idle=limits.context).to(torch.int32),
        MASK: _additive_mask(call, dtype),
    }


def pool_inputs(call: Call, pool: KVPool) -> dict[str, Tensor]:
    """Views [B, g, C, d] of the pool, by the names of the network's inputs; the network writes into them."""
    span = slice(call.first_slot, call.first_slot + call.rows)
    views = {}
    for layer in range(len(pool.keys)):
        keys, values = cache_names(layer)
        views[keys.before], views[values.before] = pool.keys[layer, span], pool.values[layer, span]
    return views


def slot_inputs(call: Call, pool: KVPool) -> dict[str, Tensor]:
    """Tokens, positions, slots, lengths and mask of a call without idle rows, and the whole pool."""
    batch, mask = call.batch, call.batch.mask
    rows, tokens = batch.tokens.shape
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=batch.tokens.device).tril().expand(rows, -1, -1)
    numbers = {TOKENS: batch.tokens, POSITIONS: batch.positions, SLOTS: batch.slots, LENGTHS: batch.lengths}
    inputs = {name: value.to(torch.int32) for name, value in numbers.items()} | {TREE: mask}
    for layer in range(len(pool.keys)):
        keys, values = cache_names(layer)
        inputs[keys.before], inputs[values.before] = pool.keys[layer], pool.values[layer]
    return inputs


def _additive_mask(call: Call, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, L]: 0 for committed entries and those in flight that the batch's mask admits (causally without one)."""
    batch = call.batch
    device = batch.tokens.device
    tokens = batch.tokens.shape[1]
    flight = torch.arange(call.live, device=device) - batch.lengths[:, None]  # [b, L], negative when committed
    if batch.mask is None:
        readable = flight[:, None] <= torch.arange(tokens, device=device)[:, None]
    else:
        last = batch.mask.shape[2] - 1
        admitted = batch.mask.gather(2, flight.clamp(0, last)[:, None].expand(-1, tokens, -1))
        readable = (flight < 0)[:, None] | (admitted & (flight <= last)[:, None])
    allowed = call.spread(readable[:, None])
    return torch.full(allowed.shape, MASKED, dtype=dtype, device=device).masked_fill_(allowed, 0.0)
