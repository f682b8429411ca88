"""Losses on the hidden states of the draft steps, memory-bounded and with their gradients computed on the way.

N roots, H hidden width, D draft vocabulary, K draft steps.
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
    """Sum over steps of the mean SmoothL1 distance of hidden states to target features (EAGLE, section 4.2)."""
    total = torch.zeros(())
    for step, predicted in enumerate(hidden):
        valid = valid_rows(batch, step)
        teacher = batch.teacher_features.roll(-step, 0)
        distance = functional.smooth_l1_loss(predicted.float(), teacher.float(), reduction="none").mean(-1)
        total = total + (distance * valid).sum() / valid.sum().clamp(min=1)
    return total


def soft_cross_entropy(
    hidden: list[Tensor], batch: PackedBatch, head: Tensor, metrics: StepMetrics | None = None
) -> Tensor:
    """Sum over steps of the mean of ``-sum_v p_v log q_v`` with p the target's and q the drafter's distribution.

    p is the softmax of the target's head on its true features, restricted to the draft vocabulary. The teacher's logits
    are computed once for all steps, a chunk of rows at a time, and the gradient (q - p) W with them, so no [N, D]
    tensor exists.

    Args:
        hidden: K tensors [N, H].
        head: [D, H] rows of the target's head, in the dtype of the matrix products; frozen.
        metrics: filled when given. The returned value is exact only then; otherwise it is 0 with the right gradient,
            because the value costs extra passes over the logits that training does not need.
    """
    value: Tensor = _SoftCrossEntropy.apply(batch, head, metrics, *hidden)
    return value


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, batch: PackedBatch, head: Tensor, metrics: StepMetrics | None, *hidden: Tensor) -> Tensor:
        teacher = batch.teacher_features.to(head.dtype)
        students = [states.detach().to(head.dtype) for states in hidden]
        # Packed teacher row i belongs to root i - k at step k, so a root is valid where its teacher is k rows in.
        weights = [valid_rows(batch, step) for step in range(len(hidden))]
        counts = [float(weight.sum().clamp(min=1)) for weight in weights]
        gradients = [torch.zeros_like(states) for states in students]
        total = 0.0
        with torch.autocast("cpu", enabled=False):
            for start in range(0, batch.rows, CHUNK_ROWS):
                stop = min(start + CHUNK_ROWS, batch.rows)
                target = torch.softmax(functional.linear(teacher[start:stop], head), dim=-1, dtype=torch.float32)
                best = target.argmax(-1) if metrics is not None else None
                for step, states in enumerate(students):
                    first, last = max(start - step, 0), stop - step
                    if last <= first:
                        continue
                    p = target[first + step - start :]
                    logits = functional.linear(states[first:last], head)
                    q = torch.softmax(logits, dim=-1, dtype=torch.float32)
                    valid = weights[step][first:last]
                    if metrics is not None and best is not None:
                        losses = _cross_entropy_values(logits.float(), p, q) * valid
                        metrics.cross_entropy[step] += losses.sum().double()
                        metrics.agreement[step] += (
                            ((q.argmax(-1) == best[first + step - start :]) * valid).sum().double()
                        )
                        metrics.rows[step] += valid.sum().double()
                        total += float(losses.sum()) / counts[step]
                    difference = q.sub_(p).mul_(valid.unsqueeze(1) / counts[step]).to(head.dtype)
                    torch.mm(difference, head, out=gradients[step][first:last])
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [states.dtype for states in hidden]
        return torch.tensor(total)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (g.to(dtype) * outer[0].to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return (None, None, None, *scaled)


def _cross_entropy_values(logits: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """``-sum p log q`` per row; log q is taken from the logits because q may underflow."""
    log_sum = logits.amax(-1) - q.amax(-1).log()
    return log_sum - torch.linalg.vecdot(p, logits)
