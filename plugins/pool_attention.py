"""Write a call's draft K/V into the shared pool and attend over it with the tree mask.

Shape legend: B rows (one request each), T tokens per row, W in-flight entries including this call's (W >= T), h query
heads, g key/value heads, d head width, S slots, C capacity of a slot.

Semantics are those of `prism_trt.engines.protocol`: with ``offset = W - T``, the K/V of row b, token i goes to index
``lengths[b] + offset + i`` of slot ``slots[b]``; a query reads every index below ``lengths[b]`` and, of the W from
there on, those its mask admits. Only live entries are read, whatever the capacity.

A thread block owns one key/value head of one row and a tile of query rows, which are tokens times the query heads that
share the head: each K/V entry is read once for the whole group. Blocks cannot wait for each other, so this call's K/V
is read from the call's input, and each block writes the K/V of its own tokens to the pool; no block reads what another
writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compilation import CompiledKernel, compile_kernel


@dataclass(frozen=True)
class Tactic:
    """Tile sizes of one variant of the kernel."""

    rows: int
    entries: int
    num_warps: int
    num_stages: int


TACTICS = {
    1: Tactic(16, 32, 4, 3),
    2: Tactic(16, 64, 4, 2),
    3: Tactic(32, 64, 8, 1),
    4: Tactic(64, 32, 8, 1),
}


def tactics_for(max_rows: int) -> list[int]:
    """Tactics for at most `max_rows` query rows per key/value head (tokens times heads in a group)."""
    smallest = min(tactic.rows for tactic in TACTICS.values())
    return [number for number, tactic in TACTICS.items() if tactic.rows < 2 * max_rows or tactic.rows == smallest]


@triton.jit
def _accumulate(query, keys, values, visible, highest, denominator, total, SCALE: tl.constexpr, MASKED: tl.constexpr):
    """One step of the online softmax, in base 2, over a tile of entries."""
    scores = tl.dot(query, tl.trans(keys)) * SCALE
    if MASKED:
        scores = tl.where(visible, scores, -1.0e30)
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_highest[:, None])
    if MASKED:
        weights = tl.where(visible, weights, 0.0)  # a row that has seen nothing yet would give exp2(0)
    shrink = tl.exp2(highest - new_highest)
    denominator = denominator * shrink + tl.sum(weights, axis=1)
    total = tl.dot(weights.to(values.dtype), values, total * shrink[:, None])
    return new_highest, denominator, total


@triton.jit
def pool_attention_kernel(
    q,
    k,
    v,
    k_pool,
    v_pool,
    slots,
    lengths,
    mask,
    num_tokens,
    num_in_flight,
    y,
    k_pool_out,
    v_pool_out,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAPACITY: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Grid: tiles of query rows, key/value heads, rows of the batch."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    first_row = tl.program_id(0) * ROWS
    kv_head = tl.program_id(1)
    request = tl.program_id(2)
    rows = first_row + tl.arange(0, ROWS)
    tokens = rows // GROUP
    dims = tl.arange(0, WIDTH)
    # Written so that the usual case, all dimensions inside, folds to unmasked loads.
    inside = tl.full((1, WIDTH), True, tl.int1) if HEAD_DIM == WIDTH else (dims < HEAD_DIM)[None, :]
    present = (tokens < num_tokens)[:, None]

    q_index = (request * num_tokens + tokens) * HEADS + kv_head * GROUP + rows % GROUP
    q_tile = q_index[:, None] * HEAD_DIM + dims[None, :]
    query = tl.load(q + q_tile, mask=present & inside, other=0.0)
    mask_rows = mask + (request * num_tokens + tokens[:, None]) * num_in_flight

    committed = tl.minimum(tl.load(lengths + request), CAPACITY)
    earlier = num_in_flight - num_tokens
    written = tl.minimum(committed + earlier, CAPACITY)
    pool_base = (tl.load(slots + request).to(tl.int64) * KV_HEADS + kv_head) * CAPACITY * HEAD_DIM
    entries = tl.arange(0, ENTRIES)

    highest = tl.full((ROWS,), -1.0e30, tl.float32)
    denominator = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, WIDTH), tl.float32)

    # Tiles of committed entries only: everything is visible.
    full = committed // ENTRIES * ENTRIES
    for start in range(0, full, ENTRIES):
        tile = pool_base + (start + entries)[:, None] * HEAD_DIM + dims[None, :]
        keys = tl.load(k_pool + tile, mask=inside, other=0.0)
        values = tl.load(v_pool + tile, mask=inside, other=0.0)
        highest, denominator, total = _accumulate(query, keys, values, True, highest, denominator, total, SCALE, False)

    # The last committed entries and those of earlier steps.
    for start in range(full, written, ENTRIES):
        index = start + entries
        tile = pool_base + index[:, None] * HEAD_DIM + dims[None, :]
        live = (index < written)[:, None]
        keys = tl.load(k_pool + tile, mask=live & inside, other=0.0)
        values = tl.load(v_pool + tile, mask=live & inside, other=0.0)
        in_flight = (index >= committed) & (index < written)
        admitted = tl.load(mask_rows + (index - committed)[None, :], mask=present & in_flight[None, :], other=0)
        visible = (index < committed)[None, :] | (admitted != 0)
        highest, denominator, total = _accumulate(
            query, keys, values, visible, highest, denominator, total, SCALE, True
        )

    # This call's entries.
    for start in range(0, num_tokens, ENTRIES):
        index = start + entries
        new = (index < num_tokens)[:, None]
        tile = ((request * num_tokens + index) * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dims[None, :]
        keys = tl.load(k + tile, mask=new & inside, other=0.0)
        values = tl.load(v + tile, mask=new & inside, other=0.0)
        seen = present & (index < num_tokens)[None, :]
        admitted = tl.load(mask_rows + (earlier + index)[None, :], mask=seen, other=0)
        highest, denominator, total = _accumulate(
            query, keys, values, admitted != 0, highest, denominator, total, SCALE, True
        )

    # A row that may read nothing gives zeros.
    result = total / tl.where(denominator == 0.0, 1.0, denominator)[:, None]
    tl.store(y + q_tile, result.to(y.dtype.element_ty), mask=present & inside)

    # The tokens whose first query row lies in this tile.
    first_token = (first_row + GROUP - 1) // GROUP
    end_token = tl.minimum((first_row + ROWS + GROUP - 1) // GROUP, num_tokens)
    token = first_token + tl.arange(0, ROWS)
    index = committed + earlier + token
    source = ((request * num_tokens + token) * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dims[None, :]
    destination = pool_base + index[:, None] * HEAD_DIM + dims[None, :]
    fits = ((token < end_token) & (index < CAPACITY))[:, None] & inside
    tl.store(k_pool_out + destination, tl.load(k + source, mask=fits), mask=fits)
    tl.store(v_pool_out + destination, tl.load(v + source, mask=fits), mask=fits)


def constants(heads: int, kv_heads: int, head_dim: int, capacity: int, tactic: Tactic) -> dict[str, int | float]:
    """Compile-time arguments of `pool_attention_kernel`."""
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "CAPACITY": capacity,
        "SCALE": head_dim**-0.5 * math.log2(math.e),
        "WIDTH": max(16, triton.next_power_of_2(head_dim)),
        "ROWS": tactic.rows,
        "ENTRIES": tactic.entries,
    }


def compile_pool_attention(
    element_type: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    tactic: Tactic,
    compute_capability: int,
    kernels: Path,
) -> CompiledKernel:
    """Compile for pools [S, g, C, d] of any number of slots; `element_type` is Triton's: ``fp16`` or ``bf16``.

    `kernels` as for `compile_kernel`.
    """
    pointer = f"*{element_type}"
    inputs = dict.fromkeys(("q", "k", "v", "k_pool", "v_pool"), pointer)
    extras = {"slots": "*i32", "lengths": "*i32", "mask": "*i8", "num_tokens": "i32", "num_in_flight": "i32"}
    outputs = dict.fromkeys(("y", "k_pool_out", "v_pool_out"), pointer)
    return compile_kernel(
        pool_attention_kernel,
        {**inputs, **extras, **outputs},
        constants(heads, kv_heads, head_dim, capacity, tactic),
        compute_capability,
        tactic.num_warps,
        tactic.num_stages,
        kernels,
    )


def pool_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    lengths: Tensor,
    mask: Tensor,
    tactic: Tactic = TACTICS[1],
) -> Tensor:
    """Launch the kernel on contiguous torch tensors; the pools are updated in place.

    Args:
        q: [B, T, h, d] float16 or bfloat16, rotated, not scaled.
        k: [B, T, g, d] of the type of `q`, rotated.
        v: [B, T, g, d].
        k_pool: [S, g, C, d].
        v_pool: [S, g, C, d].
        slots: [B] int32, all different.
        lengths: [B] int32, committed entries of each slot; ``lengths + W`` must not exceed C.
        mask: [B, T, W] bool: token i of row b may read in-flight entry j.
        tactic: tile sizes.

    Returns:
        [B, T, h, d] of the type of `q`; zeros for a token that may read nothing.
    """
    batch, num_tokens, heads, head_dim = q.shape
    kv_heads, capacity = k_pool.shape[1:3]
    y = torch.empty_like(q)
    tiles = triton.cdiv(num_tokens * heads // kv_heads, tactic.rows)
    pool_attention_kernel[(tiles, kv_heads, batch)](
        q,
        k,
        v,
        k_pool,
        v_pool,
        slots,
        lengths,
        mask.view(torch.int8),
        num_tokens,
        mask.shape[2],
        y,
        k_pool,
        v_pool,
        **constants(heads, kv_heads, head_dim, capacity, tactic),
        num_warps=tactic.num_warps,
        num_stages=tactic.num_stages,
    )
    return y
