"""The engine protocol in plain torch, on any device: the reference that other engines are compared with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from prism_trt.config import TreeShape
from prism_trt.drafter.features import fed_layers
from prism_trt.drafter.model import Drafter, ProcessingModule
from prism_trt.engines.protocol import DraftOutput, EngineLimits, LogitsFor, TargetOutput, TokenBatch
from prism_trt.errors import PrismError
from prism_trt.target.loading import Target
from prism_trt.target.model import KVPool, LlamaModel, PoolAccess, attend


class TorchEngine:
    """A target and its drafter on `device`; all modules share the drafter's pool."""

    default_tree = TreeShape()
    _spare_entries = 0
    """Entries of a slot behind its context, which belong to nobody."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        limits: EngineLimits,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        feature_layers: tuple[int, ...] | None = None,
    ) -> None:
        """Bring the weights to `device` as `dtype` and allocate the K/V pools.

        Args:
            feature_layers: numbers of the hidden states to give as features; None for those the drafter is fed.

        Raises:
            PrismError: the context is longer than the positions the target knows.
        """
        config = target.config
        limits.check_positions(config.max_position_embeddings)
        self.device = device
        self.limits = limits
        self.vocab_size = config.vocab_size
        self.feature_layers = feature_layers or fed_layers(config, drafter.config if drafter else None)
        self.feature_size = len(self.feature_layers) * config.hidden_size
        self.hidden_size = drafter.config.hidden_size if drafter else config.hidden_size
        self.has_drafter = drafter is not None
        self.draft_vocab = None
        self._dtype = dtype
        state = {name: tensor.detach().to(device, dtype) for name, tensor in target.model.state_dict().items()}
        self._target = LlamaModel.from_state(config, state)
        capacity = limits.context + self._spare_entries
        self._pool = KVPool.allocate(
            config.num_layers, limits.slots, config.num_kv_heads, capacity, config.head_dim, dtype, device
        )
        self._drafter: Drafter | None = None
        if drafter is not None:
            shape = drafter.config
            self._drafter = copy.deepcopy(drafter).to(device, dtype).requires_grad_(False).eval()
            for module in self._drafter.modules_:
                assert isinstance(module, ProcessingModule)
                for layer in module.stack:
                    layer.frequencies = layer.frequencies.to(device)
            self.draft_vocab = self._drafter.draft_vocab
            self._draft_head = self._drafter.head_rows(self._target.head_weight)
            self._draft_embedding = self._drafter.embedding(self._target.model.embed_tokens.weight)
            self._draft_pool = KVPool.allocate(
                shape.num_layers, limits.slots, shape.num_kv_heads, capacity, shape.head_dim, dtype, device
            )

    @torch.inference_mode()
    def forward(self, batch: TokenBatch, logits_for: LogitsFor = "all") -> TargetOutput:
        """See `prism_trt.engines.protocol.Engine.forward`.

        Raises:
            PrismError: the call exceeds the engine's limits.
            ValueError: two rows share a slot, or a slot does not exist.
        """
        self._check_size(batch)
        final, features = self._target(batch, self._pool, self.feature_layers)
        if logits_for == "none":
            return TargetOutput(features, None, None)
        logits = self._target.head(final if logits_for == "all" else last_valid(final, batch.counts))
        return TargetOutput(features, logits, logits.argmax(dim=-1))

    @torch.inference_mode()
    def commit(self, slots: Tensor, lengths: Tensor, accepted: Tensor, counts: Tensor) -> None:
        """See `prism_trt.engines.protocol.Engine.commit`."""
        for slot, length, path, count in zip(slots.tolist(), lengths.tolist(), accepted, counts.tolist(), strict=True):
            self._pool.move(slot, length + path[:count], length)

    @torch.inference_mode()
    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """See `prism_trt.engines.protocol.PrefixCopyEngine.copy_prefix`."""
        self._pool.copy(source, target, length)
        if self._drafter is not None:
            self._draft_pool.copy(source, target, length)

    @torch.inference_mode()
    def extend(self, batch: TokenBatch, features: Tensor) -> DraftOutput:
        """See `prism_trt.engines.protocol.Engine.extend`; raises as `forward` does."""
        return self._predict(last_valid(self._draft(0, batch, features), batch.counts))

    @torch.inference_mode()
    def step(self, k: int, batch: TokenBatch, hidden: Tensor) -> DraftOutput:
        """See `prism_trt.engines.protocol.Engine.step`; raises as `forward` does."""
        return self._predict(self._draft(k, batch, hidden))

    def _draft(self, k: int, batch: TokenBatch, hidden: Tensor) -> Tensor:
        """[B, T, H] hidden states of module sigma(k), whose K/V it writes into the draft pool."""
        if self._drafter is None:
            raise ValueError("this engine has no drafter")
        self._check_size(batch)
        access = PoolAccess.of(batch, self._draft_pool)
        return self._run_module(k, batch.tokens, batch.positions, access, hidden)

    def _run_module(self, k: int, tokens: Tensor, positions: Tensor, access: PoolAccess, hidden: Tensor) -> Tensor:
        """`_draft` of tokens [B, T] at positions [B, T] with a resolved access to the pool."""
        assert self._drafter is not None
        module = self._drafter.module(k)
        hidden = hidden.to(self._dtype)
        embeds = nn.functional.embedding(tokens, self._draft_embedding)
        x = module.fuse(embeds, hidden if k else self._drafter.fuse_features(hidden))
        for number, layer in enumerate(module.stack):
            normed = layer.input_layernorm(x)
            keys, values = access.update(self._draft_pool, number, *layer.key_value(normed, positions))
            x = layer.finish(x, attend(layer.query(normed, positions), keys, values, access.mask))
        return module.norm(x)

    def _predict(self, hidden: Tensor) -> DraftOutput:
        return DraftOutput(nn.functional.linear(hidden, self._draft_head).float(), hidden)

    def _check_size(self, batch: TokenBatch) -> None:
        size, limit = batch.tokens.numel(), self.limits.tokens_per_call
        if size > limit:
            raise PrismError(
                f"the call has {size} tokens but the engine's limit is {limit}: send them in smaller chunks"
            )


def last_valid(rows: Tensor, counts: Tensor) -> Tensor:
    """[B, 1, H]: each row's last valid token of [B, T, H], by their counts [B] int64."""
    if rows.shape[1] == 1:
        return rows
    return rows.gather(1, (counts - 1)[:, None, None].expand(-1, 1, rows.shape[2]))
