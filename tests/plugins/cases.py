"""Random inputs for the plugins' kernels, and what they must give, in float64.

The same cases run in Triton's interpreter and on a GPU.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plugins import pool_attention as pool
from plugins import step_linear as linear

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp16": 1e-3, "bf16": 1e-2}
"""Relative to the largest magnitude of the output: up to two roundings, where the interpreter truncates to bfloat16."""


@dataclass(frozen=True)
class LinearCase:
    seed: int
    dtype: str
    fp8: bool
    bias: bool
    tokens: int
    modules: int
    outputs: int
    inputs: int
    tactic: int

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `step_linear.step_linear`; some module indices are out of range."""
        generator = torch.Generator().manual_seed(self.seed)
        dtype = DTYPES[self.dtype]
        weights = torch.randn(self.modules, self.outputs, self.inputs, generator=generator)
        scales = torch.rand(self.modules, generator=generator) + 0.5
        bias = torch.randn(self.modules, self.outputs, generator=generator).to(dtype)
        return {
            "x": torch.randn(self.tokens, self.inputs, generator=generator).to(dtype),
            "weights": weights.to(torch.float8_e4m3fn if self.fp8 else dtype),
            "module_of_token": torch.randint(-1, self.modules + 1, (self.tokens,), generator=generator).int(),
            "scales": scales if self.fp8 else None,
            "bias": bias if self.bias else None,
            "tactic": linear.TACTICS[self.tactic],
        }

    @property
    def name(self) -> str:
        kind = f"{self.dtype}{'-fp8' if self.fp8 else ''}{'-bias' if self.bias else ''}"
        return f"{kind}-T{self.tokens}-M{self.modules}-O{self.outputs}-I{self.inputs}-tactic{self.tactic}"


def expected_linear(x: Tensor, weights: Tensor, module_of_token: Tensor, scales: Any, bias: Any, tactic: Any) -> Tensor:
    """[T, O] float64, token by token."""
    rows = []
    for row, module in zip(x.double(), module_of_token.clamp(0, len(weights) - 1).tolist(), strict=True):
        y = weights[module].double() @ row
        y = y if scales is None else y * scales[module].double()
        rows.append(y if bias is None else y + bias[module].double())
    return torch.stack(rows)


@dataclass(frozen=True)
class AttentionCase:
    seed: int
    dtype: str
    batch: int
    tokens: int
    earlier: int
    heads: int
    kv_heads: int
    head_dim: int
    longest: int
    tactic: int

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `pool_attention.pool_attention`: every pool entry that is not live is NaN."""
        generator = torch.Generator().manual_seed(self.seed)
        dtype = DTYPES[self.dtype]
        width = self.earlier + self.tokens
        capacity, slots = self.longest + width + 3, self.batch + 2

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        lengths = torch.randint(0, self.longest + 1, (self.batch,), generator=generator).int()
        lengths[0] = self.longest
        owned = torch.randperm(slots, generator=generator)[: self.batch].int()
        pools = []
        for _ in range(2):
            storage = torch.full((slots, self.kv_heads, capacity, self.head_dim), torch.nan, dtype=dtype)
            for slot, length in zip(owned.tolist(), lengths.tolist(), strict=True):
                live = length + self.earlier
                storage[slot, :, :live] = normal(self.kv_heads, live, self.head_dim)
            pools.append(storage)
        mask = torch.rand(self.batch, self.tokens, width, generator=generator) < 0.4
        mask |= torch.eye(self.tokens, width, dtype=torch.bool).roll(self.earlier, dims=1)
        if self.seed % 3 == 0:
            mask[-1, -1] = False  # a padding token, which reads nothing in flight
        return {
            "q": normal(self.batch, self.tokens, self.heads, self.head_dim),
            "k": normal(self.batch, self.tokens, self.kv_heads, self.head_dim),
            "v": normal(self.batch, self.tokens, self.kv_heads, self.head_dim),
            "k_pool": pools[0],
            "v_pool": pools[1],
            "slots": owned,
            "lengths": lengths,
            "mask": mask,
            "tactic": pool.TACTICS[self.tactic],
        }

    @property
    def name(self) -> str:
        return (
            f"{self.dtype}-B{self.batch}-T{self.tokens}+{self.earlier}-h{self.heads}-g{self.kv_heads}"
            f"-d{self.head_dim}-L{self.longest}-tactic{self.tactic}"
        )


def expected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    lengths: Tensor,
    mask: Tensor,
    tactic: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, h, d] float64 and the two updated pools, query by query over the entries it may read."""
    k_pool, v_pool = k_pool.clone(), v_pool.clone()
    y = torch.zeros(q.shape, dtype=torch.float64)
    tokens, heads = q.shape[1:3]
    group = heads // k.shape[2]
    earlier = mask.shape[2] - tokens
    for b, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        first = length + earlier
        k_pool[slot, :, first : first + tokens] = k[b].transpose(0, 1)
        v_pool[slot, :, first : first + tokens] = v[b].transpose(0, 1)
        for i in range(tokens):
            entries = torch.cat((torch.arange(length), length + mask[b, i].nonzero().flatten()))
            for head in range(heads if len(entries) else 0):
                keys = k_pool[slot, head // group, entries].double()
                scores = keys @ q[b, i, head].double() / q.shape[3] ** 0.5
                y[b, i, head] = scores.softmax(dim=0) @ v_pool[slot, head // group, entries].double()
    return y, k_pool, v_pool


def linear_cases() -> list[LinearCase]:
    """Every tactic with one, some and all of its tokens; types, biases and tails vary."""
    draw = random.Random(0)
    kinds = [("fp16", False), ("bf16", False), ("fp16", True), ("bf16", True)]
    cases: list[LinearCase] = []
    for number, tactic in linear.TACTICS.items():
        for tokens in (1, draw.randint(2, tactic.tokens - 1), tactic.tokens + draw.choice((0, 3))):
            dtype, fp8 = kinds[len(cases) % len(kinds)]
            outputs = tactic.outputs * draw.randint(1, 2) - draw.choice((0, 5))
            inputs = tactic.inputs * draw.randint(1, 2) - draw.choice((0, 24))
            modules = draw.randint(1, 4)
            cases.append(
                LinearCase(len(cases), dtype, fp8, draw.random() < 0.5, tokens, modules, outputs, inputs, number)
            )
    return cases


def attention_cases() -> list[AttentionCase]:
    """Every tactic; grouped and ungrouped heads, odd head widths, empty and long contexts, first and later steps."""
    shapes = [
        # batch, tokens, earlier, heads, kv_heads, head_dim, longest, tactic
        (1, 1, 0, 4, 1, 32, 0, 1),
        (2, 10, 10, 4, 2, 16, 37, 1),
        (1, 8, 0, 8, 2, 64, 128, 2),
        (3, 5, 7, 3, 1, 24, 65, 2),
        (1, 13, 20, 6, 2, 40, 90, 3),
        (2, 4, 0, 2, 2, 128, 70, 3),
        (1, 33, 31, 4, 1, 32, 50, 4),
        (1, 64, 0, 2, 1, 16, 33, 4),
    ]
    return [AttentionCase(seed, ("fp16", "bf16")[seed % 2], *shape) for seed, shape in enumerate(shapes)]


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with tensors on `device`."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def assert_close(actual: Tensor, expected: Tensor, dtype: str) -> None:
    """`actual` is finite and within `TOLERANCE` of the float64 `expected`."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)
