"""The packed attention against the same attention written as one dense masked softmax per sequence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prism_trt.train.attention import joint_attention
from prism_trt.train.batch import SequenceSpan

HEADS, GROUPS, WIDTH = 6, 2, 4
SPANS = (SequenceSpan(0, 3, 0, 5), SequenceSpan(3, 0, 5, 1), SequenceSpan(3, 4, 6, 2))


def dense(
    query: Tensor, prompt: tuple[Tensor, Tensor], roots: tuple[Tensor, Tensor], own: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """One softmax over [prompt columns | root columns up to the row's own | one column per own step]."""
    outputs = []
    for span in SPANS:
        for i in range(span.roots):
            row = span.root_start + i
            columns = []
            for side in (0, 1):
                parts = [
                    prompt[side][span.prompt_start : span.prompt_start + span.prompts],
                    roots[side][span.root_start : row + 1],
                    *(step[side][row : row + 1] for step in own),
                ]
                columns.append(torch.cat(parts).repeat_interleave(HEADS // GROUPS, dim=1))
            keys, values = columns
            probabilities = torch.softmax(torch.einsum("hd,chd->hc", query[row], keys) / math.sqrt(WIDTH), dim=-1)
            outputs.append(torch.einsum("hc,chd->hd", probabilities, values).flatten())
    return torch.stack(outputs)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_output_and_gradients_equal_the_dense_form(steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)

    def leaf(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()

    query = leaf(8, HEADS)
    prompt, roots = (leaf(7, GROUPS), leaf(7, GROUPS)), (leaf(8, GROUPS), leaf(8, GROUPS))
    own = [(leaf(8, GROUPS), leaf(8, GROUPS)) for _ in range(steps)]
    leaves = [query, *prompt, *roots, *(side for step in own for side in step)]
    outer = torch.randn(8, HEADS * WIDTH, dtype=torch.float64, generator=generator)

    expected = dense(query, prompt, roots, own)
    found = joint_attention(SPANS, query, prompt, roots, own)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(found, leaves, outer), torch.autograd.grad(expected, leaves, outer), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
