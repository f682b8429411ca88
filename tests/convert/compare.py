"""Batches, and how far a walked network may be from float32 PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_trt.drafter.model import Drafter
from prism_trt.engines.protocol import TokenBatch
from prism_trt.engines.tensorrt.binding import NetworkLimits
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.target.loading import Target

LIMITS = NetworkLimits(slots=3, context=64, prefill_tokens=32, shared_tokens=12)
CPU = torch.device("cpu")


def reference(target: Target, drafter: Drafter | None, dtype: torch.dtype = torch.float32) -> TorchEngine:
    """PyTorch on the same weights."""
    return TorchEngine(target, drafter, LIMITS.engine, CPU, dtype)


def round_weights(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round the parameters to `dtype` in place, so that only the arithmetic differs between types."""
    for parameter in module.parameters():
        parameter.data.copy_(parameter.data.to(dtype))


def assert_close(actual: Tensor | None, expected: Tensor | None) -> None:
    """Equal but for the order of float32 sums."""
    assert actual is not None and expected is not None
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def assert_as_exact(actual: Tensor | None, rounded: Tensor | None, expected: Tensor | None) -> None:
    """`actual` is at most twice as far from float32's `expected` as `rounded`, PyTorch in the type of `actual`, is."""
    assert actual is not None and rounded is not None and expected is not None
    error, usual = ((values.float() - expected).square().mean().sqrt() for values in (actual, rounded))
    assert 0 < error < 2 * usual


def words(*shape: int, seed: int) -> Tensor:
    return torch.randint(0, 320, shape, generator=torch.Generator().manual_seed(seed))


def following(tokens: Tensor, slots: list[int], lengths: list[int], counts: list[int]) -> TokenBatch:
    """A causal batch."""
    start = torch.tensor(lengths)
    positions = start[:, None] + torch.arange(tokens.shape[1])
    return TokenBatch(tokens, positions, torch.tensor(slots), start, torch.tensor(counts))
