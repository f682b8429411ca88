"""The optimizer of a stage."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from prism_trt.config import TrainConfig

_BETAS = (0.9, 0.95)


class StageOptimizer:
    """AdamW, or Muon for the matrices and AdamW for the rest, behind one learning rate."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        parameters = list(model.parameters())
        matrices = [p for p in parameters if p.dim() == 2] if config.optimizer == "muon" else []
        rest = [p for p in parameters if p.dim() != 2] if config.optimizer == "muon" else parameters
        adamw = torch.optim.AdamW(rest, lr=0.0, betas=_BETAS, weight_decay=config.weight_decay, fused=True)
        self.parts: list[torch.optim.Optimizer] = [adamw]
        if matrices:
            # Scaled to AdamW's usual update size, so one learning rate suits both.
            muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)
        self._parameters = parameters
        self._clip = config.clip

    def clip(self) -> float:
        """Scale the gradients down to the configured norm; returns the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self, lr: float) -> None:
        """Apply the gradients at learning rate `lr` and clear them."""
        for optimizer in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
