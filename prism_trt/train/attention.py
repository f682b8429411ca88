"""Attention of training-time alignment over packed rows, with its gradient.

At draft step k the query of root r reads the K/V that module sigma(0) wrote from the target's features at positions
0..r, and the K/V of the same root's own steps 1..k (one entry each): exactly what the K/V pool holds when the drafter
serves. Written as a matrix this is a causal block plus k diagonals. Everything masked is -inf before one joint softmax;
HASS multiplies masked scores by 0 instead, which leaves exp(0) in the denominator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prism_trt.train.batch import SequenceSpan


def joint_attention(
    spans: tuple[SequenceSpan, ...],
    query: Tensor,
    prompt_kv: tuple[Tensor, Tensor],
    root_kv: tuple[Tensor, Tensor],
    own_steps: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """Attention output [N, h*d] of the queries [N, h, d] of one draft step.

    Args:
        spans: the batch's layout.
        query: rotated queries of the N roots.
        prompt_kv: step 0's rotated keys and values of the prompt rows, [P, g, d] each.
        root_kv: step 0's keys and values of the roots, [N, g, d] each; root r reads those of roots up to r.
        own_steps: keys and values [N, g, d] of steps 1..k, which only the same root reads.
    """
    own_keys = [key for key, _ in own_steps]
    own_values = [value for _, value in own_steps]
    output: Tensor = _JointAttention.apply(spans, query, *prompt_kv, *root_kv, *own_keys, *own_values)
    return output.flatten(1)


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """[A, h, d] -> contiguous [g, (h/g)*A, d], so that the query heads of a group share one matrix product."""
    length, heads, width = rows.shape
    return rows.view(length, groups, heads // groups, width).permute(1, 2, 0, 3).reshape(groups, -1, width)


def _by_row(grouped: Tensor, length: int) -> Tensor:
    """The inverse of `_by_group`: [g, (h/g)*A, d] -> [A, h, d]."""
    groups, _, width = grouped.shape
    return grouped.view(groups, -1, length, width).permute(2, 0, 1, 3).reshape(length, -1, width)


def _context(prompt: Tensor, roots: Tensor, span: SequenceSpan) -> Tensor:
    """The K or V columns of one sequence, [g, C, d]."""
    prompt_rows = prompt[span.prompt_start : span.prompt_start + span.prompts]
    root_rows = roots[span.root_start : span.root_start + span.roots]
    return torch.cat((prompt_rows, root_rows)).transpose(0, 1).contiguous()


class _JointAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spans: tuple[SequenceSpan, ...], query: Tensor, *kv: Tensor) -> Tensor:
        prompt_keys, prompt_values, root_keys, root_values, *own = kv
        own_keys, own_values = own[: len(own) // 2], own[len(own) // 2 :]
        rows, heads, width = query.shape
        groups = root_keys.shape[1]
        scale = width**-0.5
        output = torch.empty_like(query)
        probabilities: list[Tensor] = []
        wide = query.view(rows, groups, heads // groups, width)
        own_scores = [
            (wide * key.unsqueeze(2)).sum(-1, dtype=torch.float32).mul_(scale).view(rows, heads) for key in own_keys
        ]
        own_probabilities = query.new_empty(len(own_keys), rows, heads)
        with torch.autocast(query.device.type, enabled=False):
            for span in spans:
                part = slice(span.root_start, span.root_start + span.roots)
                columns = span.prompts + span.roots
                keys = _context(prompt_keys, root_keys, span)
                values = _context(prompt_values, root_values, span)
                scores = torch.bmm(_by_group(query[part], groups), keys.transpose(1, 2)).float().mul_(scale)
                scores = scores.view(heads, span.roots, columns)
                future = torch.ones(span.roots, span.roots, dtype=torch.bool, device=query.device).triu(1)
                scores[:, :, span.prompts :].masked_fill_(future, float("-inf"))
                if own_scores:
                    scores = torch.cat((scores, torch.stack([s[part].t() for s in own_scores], dim=-1)), dim=-1)
                joint = torch.softmax(scores, dim=-1).to(query.dtype)
                main = joint[:, :, :columns].reshape(groups, -1, columns)
                output[part] = _by_row(torch.bmm(main, values), span.roots)
                probabilities.append(main)
                if own_scores:
                    own_probabilities[:, part] = joint[:, :, columns:].permute(2, 1, 0)
            wide_output = output.view(rows, groups, heads // groups, width)
            for share, value in zip(own_probabilities, own_values, strict=True):
                wide_output.addcmul_(share.view(rows, groups, -1, 1), value.unsqueeze(2))
        ctx.spans = spans
        ctx.probabilities = probabilities
        ctx.save_for_backward(query, output, own_probabilities, *kv)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, output, own_probabilities, *kv = ctx.saved_tensors
        prompt_keys, prompt_values, root_keys, root_values, *own = kv
        own_keys, own_values = own[: len(own) // 2], own[len(own) // 2 :]
        rows, heads, width = query.shape
        groups = root_keys.shape[1]
        scale = width**-0.5
        d_output = gradients[0].to(query.dtype).contiguous()
        # d(score) = p * (d(p) - sum_j p_j d(p_j)), and that sum is the product of the output and its gradient.
        correction = (d_output * output).sum(-1, dtype=torch.float32)

        d_query = torch.empty_like(query)
        d_prompt_keys, d_prompt_values = torch.empty_like(prompt_keys), torch.empty_like(prompt_values)
        d_root_keys, d_root_values = torch.empty_like(root_keys), torch.empty_like(root_values)
        for span, main in zip(ctx.spans, ctx.probabilities, strict=True):
            part = slice(span.root_start, span.root_start + span.roots)
            prompt_part = slice(span.prompt_start, span.prompt_start + span.prompts)
            keys = _context(prompt_keys, root_keys, span)
            values = _context(prompt_values, root_values, span)
            grouped = _by_group(d_output[part], groups)
            d_values = torch.bmm(main.transpose(1, 2), grouped).transpose(0, 1)
            d_main = torch.bmm(grouped, values.transpose(1, 2)).float()
            shift = correction[part].t().reshape(groups, -1, 1)
            d_scores = d_main.sub_(shift).mul_(main).mul_(scale).to(query.dtype)
            d_query[part] = _by_row(torch.bmm(d_scores, keys), span.roots)
            d_keys = torch.bmm(d_scores.transpose(1, 2), _by_group(query[part], groups)).transpose(0, 1)
            d_prompt_keys[prompt_part], d_root_keys[part] = d_keys[: span.prompts], d_keys[span.prompts :]
            d_prompt_values[prompt_part], d_root_values[part] = d_values[: span.prompts], d_values[span.prompts :]

        shape = (rows, groups, heads // groups, width)
        wide_query, wide_d_output, wide_d_query = query.view(shape), d_output.view(shape), d_query.view(shape)
        d_own_keys, d_own_values = [], []
        for share, key, value in zip(own_probabilities, own_keys, own_values, strict=True):
            share_wide = share.view(*shape[:3], 1)
            d_share = (wide_d_output * value.unsqueeze(2)).sum(-1, keepdim=True, dtype=torch.float32)
            d_score = (share_wide * (d_share - correction.view(*shape[:3], 1)) * scale).to(query.dtype)
            d_own_values.append((wide_d_output * share_wide).sum(2))
            d_own_keys.append((wide_query * d_score).sum(2))
            wide_d_query.addcmul_(d_score, key.unsqueeze(2))
        return (
            None,
            d_query,
            d_prompt_keys,
            d_prompt_values,
            d_root_keys,
            d_root_values,
            *d_own_keys,
            *d_own_values,
        )
