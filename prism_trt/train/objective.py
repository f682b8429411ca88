"""The loss of a training stage as one call of one module, which is what data-parallel wrappers need."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prism_trt.config import TrainConfig
from prism_trt.drafter.model import Drafter
from prism_trt.train.alignment import aligned_steps
from prism_trt.train.batch import PackedBatch
from prism_trt.train.losses import StepMetrics, hidden_loss, soft_cross_entropy
from prism_trt.train.stages import Stage


class Objective(nn.Module):
    """A drafter with what its losses need of the target."""

    embedding: Tensor
    head: Tensor

    def __init__(self, drafter: Drafter, embedding: Tensor, head: Tensor, config: TrainConfig) -> None:
        """Keep references.

        Args:
            embedding: [V, H] the target's embedding table, in the dtype of the matrix products.
            head: [D, H] the target's head rows of the draft vocabulary, likewise.
        """
        super().__init__()
        self.drafter = drafter
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("head", head, persistent=False)
        self._config = config

    def forward(
        self, batch: PackedBatch, stage: Stage, noise: Tensor | None, metrics: StepMetrics | None
    ) -> tuple[Tensor, Tensor]:
        """The stage's loss on `batch`, and the hidden-state loss in it (detached); see `soft_cross_entropy`."""
        compute = self.embedding.dtype
        with torch.autocast(self.embedding.device.type, compute, enabled=compute != torch.float32):
            hidden = aligned_steps(self.drafter, self.embedding, batch, stage.steps, stage.detach, noise)
            distance = torch.zeros((), device=self.embedding.device)
            if stage.hidden_weight:
                distance = hidden_loss(hidden, batch)
            own_head = None if self.drafter.lm_head is None else self.drafter.lm_head.weight
            entropy = soft_cross_entropy(hidden, batch, self.head, metrics, stage.top_k_weight, own_head)
            loss = stage.hidden_weight * distance + self._config.cross_entropy_weight * entropy
        return loss, distance.detach()
