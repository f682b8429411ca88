"""`TorchEngine`: the engine protocol in plain torch, on any device. The reference that other engines are compared with."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from prism_trt.config import TreeShape
from prism_trt.drafter.model import Drafter
from prism_trt.engines.protocol import DraftOutput, EngineLimits, LogitsFor, TargetOutput, TokenBatch
from prism_trt.errors import PrismError
from prism_trt.target.loading import Target
from prism_trt.target.model import KVPool, LlamaModel, PoolAccess, attend


Module = TypeVar("Module", bound=nn.Module)


class TorchEngine:
    """A target and its drafter on `device`; the drafter's pool has one layer that all modules share."""

    default_tree = TreeShape()

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        limits: EngineLimits,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Copy the weights to `device` as `dtype` and allocate the K/V pools."""
        config = target.config
        self.device = device
        self.limits = limits
        self.vocab_size = config.vocab_size
        self.hidden_size = self.feature_size = config.hidden_size
        self.has_drafter = drafter is not None
        self.draft_vocab = None
        self._dtype = dtype
        self._target = _copy(target.model, LlamaModel(config), device, dtype)
        self._pool = KVPool.allocate(
            config.num_layers, limits.slots, config.num_kv_heads, limits.context, config.head_dim, dtype, device
        )
        if drafter is not None:
            shape = drafter.config
            self._drafter = _copy(drafter, Drafter(shape, drafter.draft_vocab), device, dtype)
            self.draft_vocab = self._drafter.draft_vocab
            self._draft_head = self._drafter.head_rows(self._target.head_weight)
            self._draft_pool = KVPool.allocate(
                1, limits.slots, shape.num_kv_heads, limits.context, shape.head_dim, dtype, device
            )

    @torch.inference_mode()
    def forward(self, batch: TokenBatch, logits_for: LogitsFor = "all") -> TargetOutput:
        """See `prism_trt.engines.protocol.Engine.forward`.

        Raises:
            PrismError: a token lies outside the context.
        """
        self._check(batch)
        features = self._target(batch, self._pool)
        if logits_for == "none":
            return TargetOutput(features, None, None)
        logits = self._target.head(features if logits_for == "all" else _last(features, batch))
        return TargetOutput(features, logits, logits.argmax(dim=-1))

    @torch.inference_mode()
    def commit(self, slots: Tensor, lengths: Tensor, accepted: Tensor, counts: Tensor) -> None:
        """See `prism_trt.engines.protocol.Engine.commit`."""
        rows = zip(slots.tolist(), lengths.tolist(), accepted, counts.tolist(), strict=True)
        for slot, length, path, count in rows:
            self._pool.move(slot, length + path[:count], length)

    @torch.inference_mode()
    def extend(self, batch: TokenBatch, features: Tensor) -> DraftOutput:
        """See `prism_trt.engines.protocol.Engine.extend`."""
        hidden = _last(self._draft(0, batch, features), batch)
        return DraftOutput(self._draft_logits(hidden), hidden)

    @torch.inference_mode()
    def step(self, k: int, batch: TokenBatch, hidden: Tensor) -> DraftOutput:
        """See `prism_trt.engines.protocol.Engine.step`."""
        hidden = self._draft(k, batch, hidden)
        return DraftOutput(self._draft_logits(hidden), hidden)

    def _draft(self, k: int, batch: TokenBatch, hidden: Tensor) -> Tensor:
        self._check(batch)
        module = self._drafter.module(k)
        embeds = self._target.model.embed_tokens(batch.tokens)
        x = module.fuse(embeds, hidden.to(self._dtype))
        access = PoolAccess.of(batch)
        q, k_new, v_new = module.qkv(x, batch.positions)
        keys, values = access.update(self._draft_pool, 0, k_new, v_new)
        return module.finish(x, attend(q, keys, values, access.mask))

    def _draft_logits(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self._draft_head).float()

    def _check(self, batch: TokenBatch) -> None:
        end = int((batch.lengths + batch.offset + batch.counts).max())
        if end > self.limits.context:
            raise PrismError(f"the call needs {end} K/V entries but the context has {self.limits.context}: shorten the prompt")
        if len(set(batch.slots.tolist())) < len(batch.slots):
            raise ValueError("two rows of a call share a slot")


def _copy(source: Module, twin: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """`twin` with the parameters of `source`; float32 tables keep their type. Parameters are shared where possible."""
    state = {name: tensor.to(device, dtype) for name, tensor in source.state_dict().items()}
    twin.load_state_dict(state, assign=True)
    for name, buffer in source.named_buffers():
        if name not in state:
            owner, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(owner), leaf, buffer.to(device))
    return twin.requires_grad_(False).eval()


def _last(rows: Tensor, batch: TokenBatch) -> Tensor:
    """[B, 1, H]: each row's last valid token of [B, T, H]."""
    index = (batch.counts - 1)[:, None, None].expand(-1, 1, rows.shape[2])
    return rows.gather(1, index)
