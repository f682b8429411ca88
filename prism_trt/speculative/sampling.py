"""Sampling parameters, the distribution they define, and drawing from it."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from prism_trt.config import StrictModel

GREEDY_BELOW = 1e-5
"""Lower temperatures than this are greedy: dividing by the least of them would overflow float32."""
_FIRST_RANKED = 256
"""Tokens among which a nucleus is looked for first."""


class SamplingParams(StrictModel):
    """How a request's tokens are drawn."""

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="below 1e-5 greedy")
    top_k: int = Field(default=0, ge=0, description="keep the k most probable tokens; 0 keeps all")
    top_p: float = Field(default=1.0, gt=0, le=1, description="keep the smallest set of tokens with this probability")
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="None: a fresh one for each request")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW


def warp(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that `params` make of `logits`: temperature, then top-k, then top-p, as Hugging Face does.

    Args:
        logits: [..., V] floating point.

    Returns:
        [..., V] float32 probabilities. Greedy parameters give all mass to the highest logit, ties to the lowest
        index. Logits equal to the k-th are all kept; of equal ones at the edge of top-p, the lowest index first.
    """
    if params.greedy:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    scaled = logits.float() / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        smallest = scaled.topk(params.top_k).values[..., -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    probs = scaled.softmax(-1)
    if params.top_p < 1:
        probs = probs * _nucleus(probs, params.top_p)
        probs /= probs.sum(-1, keepdim=True)
    return probs


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """[..., V] bool: the smallest set of tokens with probability `top_p`, of equal ones the lowest index first.

    Sorting a whole vocabulary takes about as long as a target pass, and the set is mostly small.
    """
    size = min(_FIRST_RANKED, probs.shape[-1])
    while True:
        ranked = probs.topk(size).values
        before = ranked.cumsum(-1) - ranked
        if size == probs.shape[-1] or bool((before[..., -1] >= top_p).all()):
            break
        size = min(4 * size, probs.shape[-1])
    count = (before < top_p).sum(-1, keepdim=True)
    edge = ranked.gather(-1, count - 1)
    above, level = probs > edge, probs == edge
    return above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def make_generator(params: SamplingParams) -> torch.Generator | None:
    """The request's own CPU generator; None when it needs none."""
    if params.greedy:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def uniforms(generator: torch.Generator, count: int) -> list[float]:
    """`count` numbers in [0, 1) with 53 random bits."""
    return torch.rand(count, generator=generator, dtype=torch.float64).tolist()


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sampling.

    Args:
        probs: [B, V] non-negative, not all zero in a row; need not sum to 1.
        uniform: [B] float64 in [0, 1).

    Returns:
        [B] int64 tokens, always of positive probability.
    """
    cdf = probs.double().cumsum(-1)
    total = cdf[:, -1:]
    # Rounding may lift the product to the total itself, which no token's share covers.
    point = torch.minimum(uniform.to(cdf.device)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, point, right=True)[:, 0]
