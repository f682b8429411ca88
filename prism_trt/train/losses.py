"""Losses on the hidden states of the draft steps, memory-bounded and with their gradients computed on the way.

N roots, H the target's and h the drafter's hidden width, D draft vocabulary, K draft steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prism_trt.train.batch import PackedBatch

CHUNK_ROWS = 256
"""Rows whose logits exist at once: [256, 8192] fp32 is 8 MiB, which stays in the last-level cache."""
TOP_K = 10
"""Tokens of HASS's top-K loss, its paper's value."""


@dataclass
class StepMetrics:
    """Sums over the valid rows of each draft step, filled by `soft_cross_entropy`; [K] float64 each."""

    cross_entropy: Tensor
    agreement: Tensor
    """Rows whose first choice is the target's."""
    rows: Tensor

    @classmethod
    def zeros(cls, steps: int) -> StepMetrics:
        """Empty sums."""
        return cls(*(torch.zeros(steps, dtype=torch.float64) for _ in range(3)))


def valid_rows(batch: PackedBatch, step: int) -> Tensor:
    """[N] float32: 1 where the root has a draft step `step`, else 0."""
    return (batch.remaining >= step).float()


def hidden_loss(hidden: list[Tensor], batch: PackedBatch) -> Tensor:
    """Sum over steps of the mean SmoothL1 distance of hidden states to target features (EAGLE, section 4.2).

    The mean is over the rows of the whole update, so that the parts of an update add up.
    """
    total = torch.zeros((), device=batch.root_tokens.device)
    for step, predicted in enumerate(hidden):
        valid = valid_rows(batch, step)
        teacher = batch.teacher_features.roll(-step, 0)
        distance = functional.smooth_l1_loss(predicted.float(), teacher.float(), reduction="none").mean(-1)
        total = total + (distance * valid).sum() / batch.update_rows(step)
    return total


def soft_cross_entropy(
    hidden: list[Tensor],
    batch: PackedBatch,
    head: Tensor,
    metrics: StepMetrics | None = None,
    top_k_weight: float = 0.0,
    own_head: Tensor | None = None,
) -> Tensor:
    """Sum over steps of the mean of ``-sum_v p_v log q_v`` with p the target's and q the drafter's distribution.

    The mean is over the rows of the whole update, so that the parts of an update add up. p is the softmax of the
    target's head on its true features, restricted to the draft vocabulary. The teacher's logits are computed once for
    all steps, a chunk of rows at a time, and the gradient (q - p) W with them, so no [N, D] tensor exists.

    Args:
        hidden: K tensors [N, h].
        head: [D, H] rows of the target's head, in the dtype of the matrix products; frozen.
        metrics: filled when given, without the top-K loss. The returned value is exact only then; otherwise it is 0
            with the right gradient, because the value costs extra passes over the logits that training does not need.
        top_k_weight: weight of HASS's top-K loss (section 3.2), which adds the same sum over the target's `TOP_K`
            likeliest tokens only, to the returned value too.
        own_head: [D, h] trained head of the drafter; None when it predicts with `head`.
    """
    value: Tensor = _SoftCrossEntropy.apply(batch, head, own_head, metrics, top_k_weight, *hidden)
    return value


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        batch: PackedBatch,
        head: Tensor,
        own_head: Tensor | None,
        metrics: StepMetrics | None,
        top_k_weight: float,
        *hidden: Tensor,
    ) -> Tensor:
        teacher = batch.teacher_features.to(head.dtype)
        student_head = head if own_head is None else own_head.detach().to(head.dtype)
        students = [states.detach().to(head.dtype) for states in hidden]
        # Packed teacher row i belongs to root i - k at step k, so a root is valid where its teacher is k rows in.
        weights = [valid_rows(batch, step) for step in range(len(hidden))]
        counts = [float(batch.update_rows(step)) for step in range(len(hidden))]
        gradients = [torch.zeros_like(states) for states in students]
        head_gradient = None if own_head is None else torch.zeros_like(own_head, dtype=torch.float32)
        total = 0.0
        with torch.autocast(teacher.device.type, enabled=False):
            for start in range(0, batch.rows, CHUNK_ROWS):
                stop = min(start + CHUNK_ROWS, batch.rows)
                target = torch.softmax(functional.linear(teacher[start:stop], head), dim=-1, dtype=torch.float32)
                best = target.argmax(-1) if metrics is not None else None
                # Both losses together are sum_v c_v log q_v, whose gradient by the logits is q sum(c) - c.
                share, mass = target, None
                if top_k_weight:
                    top, indices = target.topk(min(TOP_K, target.shape[1]), dim=-1)
                    share = target.scatter_add(1, indices, top_k_weight * top)
                    mass = 1 + top_k_weight * top.sum(-1, keepdim=True)
                for step, states in enumerate(students):
                    first, last = max(start - step, 0), stop - step
                    if last <= first:
                        continue
                    rows = slice(first + step - start, stop - start)
                    logits = functional.linear(states[first:last], student_head)
                    q = torch.softmax(logits, dim=-1, dtype=torch.float32)
                    valid = weights[step][first:last]
                    if metrics is not None and best is not None:
                        losses = _cross_entropy_values(logits.float(), target[rows], q) * valid
                        metrics.cross_entropy[step] += losses.sum().double().cpu()
                        metrics.agreement[step] += ((q.argmax(-1) == best[rows]) * valid).sum().double().cpu()
                        metrics.rows[step] += valid.sum().double().cpu()
                        if mass is not None:
                            losses = _cross_entropy_values(logits.float(), share[rows], q, mass[rows, 0]) * valid
                        total += float(losses.sum()) / counts[step]
                    difference = (q if mass is None else q.mul_(mass[rows])).sub_(share[rows])
                    difference = difference.mul_(valid.unsqueeze(1) / counts[step]).to(head.dtype)
                    torch.mm(difference, student_head, out=gradients[step][first:last])
                    if head_gradient is not None:
                        head_gradient += difference.t() @ states[first:last]
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [states.dtype for states in hidden]
        ctx.head_gradient = head_gradient
        return torch.tensor(total, device=teacher.device)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (g.to(dtype) * outer[0].to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        head_gradient = None if ctx.head_gradient is None else ctx.head_gradient * outer[0]
        return (None, None, head_gradient, None, None, *scaled)


def _cross_entropy_values(logits: Tensor, c: Tensor, q: Tensor, mass: Tensor | float = 1.0) -> Tensor:
    """``-sum c log q`` per row, where c sums to `mass`; log q is taken from the logits because q may underflow."""
    log_sum = logits.amax(-1) - q.amax(-1).log()
    return mass * log_sum - torch.linalg.vecdot(c, logits)
