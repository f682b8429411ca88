"""Losses and their hand-written gradients against autograd on the plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from prism_trt.data.sequences import FeatureSequence
from prism_trt.train import losses
from prism_trt.train.batch import PackedBatch, pack
from prism_trt.train.losses import StepMetrics, hidden_loss, soft_cross_entropy

WIDTH, VOCAB = 6, 11


def make_batch() -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    lengths = [(2, 5), (1, 2), (3, 8), (2, 3)]
    return pack(
        [
            FeatureSequence(
                torch.randint(0, VOCAB, (p + a,), generator=generator),
                torch.randn(p + a - 1, WIDTH, generator=generator),
                p,
                True,
            )
            for p, a in lengths
        ]
    )


def plain(hidden: list[Tensor], batch: PackedBatch, head: Tensor) -> list[Tensor]:
    """The mean cross-entropy of each step, over the roots that have the step."""
    values = []
    for step, states in enumerate(hidden):
        rows = [i for i in range(batch.rows) if int(batch.remaining[i]) >= step]
        teacher = torch.stack([batch.teacher_features[i + step] for i in rows])
        p = (teacher @ head.T).softmax(-1)
        values.append(-(p * (states[rows] @ head.T).log_softmax(-1)).sum(-1).mean())
    return values


@pytest.mark.parametrize("chunk", [3, 4, 256])
@pytest.mark.parametrize("steps", [1, 3])
def test_cross_entropy_equals_the_plain_formula(steps: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ROWS", chunk)
    batch = make_batch()
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(VOCAB, WIDTH, generator=generator)
    hidden = [torch.randn(batch.rows, WIDTH, generator=generator).requires_grad_() for _ in range(steps)]
    metrics = StepMetrics.zeros(steps)

    found = 0.7 * soft_cross_entropy(hidden, batch, head, metrics)
    expected = plain(hidden, batch, head)
    torch.testing.assert_close(found, 0.7 * torch.stack(expected).sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        (metrics.cross_entropy / metrics.rows).float(), torch.stack(expected).detach(), rtol=1e-5, atol=1e-6
    )
    gradients = torch.autograd.grad(found, hidden)
    for a, b in zip(gradients, torch.autograd.grad(0.7 * torch.stack(expected).sum(), hidden), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    unmeasured = torch.autograd.grad(0.7 * soft_cross_entropy(hidden, batch, head), hidden)
    assert all(torch.equal(a, b) for a, b in zip(gradients, unmeasured, strict=True))


def test_agreement_counts_rows_where_the_first_choices_are_the_same() -> None:
    batch = make_batch()
    head = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(2))
    perfect = [batch.teacher_features.roll(-step, 0) for step in range(2)]
    metrics = StepMetrics.zeros(2)
    soft_cross_entropy(perfect, batch, head, metrics)
    assert metrics.rows.tolist() == [batch.rows, int((batch.remaining >= 1).sum())]
    assert torch.equal(metrics.agreement, metrics.rows)
    wrong = StepMetrics.zeros(2)
    soft_cross_entropy([-states for states in perfect], batch, head, wrong)
    assert wrong.agreement.sum() == 0


def test_hidden_loss_equals_the_plain_formula() -> None:
    batch = make_batch()
    generator = torch.Generator().manual_seed(3)
    hidden = [torch.randn(batch.rows, WIDTH, generator=generator) for _ in range(2)]
    expected = torch.zeros(())
    for step, states in enumerate(hidden):
        rows = [i for i in range(batch.rows) if int(batch.remaining[i]) >= step]
        teacher = torch.stack([batch.teacher_features[i + step] for i in rows])
        expected = expected + functional.smooth_l1_loss(states[rows], teacher)
    torch.testing.assert_close(hidden_loss(hidden, batch), expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_top_k_loss_and_own_head_equal_autograd(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "TOP_K", 4)
    batch = make_batch()
    generator = torch.Generator().manual_seed(2)
    head = torch.randn(VOCAB, WIDTH, generator=generator)
    own = torch.randn(VOCAB, 4, generator=generator).requires_grad_()
    hidden = [torch.randn(batch.rows, 4, generator=generator).requires_grad_() for _ in range(steps)]
    metrics = StepMetrics.zeros(steps)
    value = 0.7 * soft_cross_entropy(hidden, batch, head, metrics, 2.5, own)
    value.backward()
    found = [own.grad, *(states.grad for states in hidden)]

    own.grad = None
    expected_hidden = [states.detach().clone().requires_grad_() for states in hidden]
    total, entropy = torch.zeros(()), []
    for step, states in enumerate(expected_hidden):
        rows = [i for i in range(batch.rows) if int(batch.remaining[i]) >= step]
        p = (torch.stack([batch.teacher_features[i + step] for i in rows]) @ head.T).softmax(-1)
        log_q = (states[rows] @ own.T).log_softmax(-1)
        top, indices = p.topk(4, -1)
        entropy.append(-(p * log_q).sum(-1).mean().item())
        total = total - (p * log_q).sum(-1).mean() - 2.5 * (top * log_q.gather(1, indices)).sum(-1).mean()
    torch.testing.assert_close(value.detach(), 0.7 * total.detach(), rtol=1e-5, atol=1e-6)
    assert (metrics.cross_entropy / metrics.rows).tolist() == pytest.approx(entropy, rel=1e-5)
    (0.7 * total).backward()
    expected = [own.grad, *(states.grad for states in expected_hidden)]
    for a, b in zip(found, expected, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_parts_of_an_update_add_up() -> None:
    """Losses and gradients of an update do not depend on the parts it is cut into."""
    generator = torch.Generator().manual_seed(3)
    sequences = [
        FeatureSequence(torch.randint(0, VOCAB, (n,), generator=generator), torch.randn(n - 1, WIDTH), 2, True)
        for n in (9, 6, 14)
    ]
    head = torch.randn(VOCAB, WIDTH, generator=generator)
    weight = torch.randn(WIDTH, WIDTH, generator=generator).requires_grad_()

    def gradient(parts: list[list[FeatureSequence]]) -> Tensor:
        weight.grad = None
        roots = [sequence.roots for part in parts for sequence in part]
        for part in parts:
            batch = pack(part, roots)
            hidden = [(batch.root_features + step) @ weight for step in range(3)]
            (hidden_loss(hidden, batch) + soft_cross_entropy(hidden, batch, head)).backward()
        assert weight.grad is not None
        return weight.grad

    torch.testing.assert_close(gradient([sequences[:1], sequences[1:]]), gradient([sequences]), rtol=1e-5, atol=1e-6)
