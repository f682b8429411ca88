"""The engine protocol over three networks, whatever executes them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from prism_trt.config import DrafterConfig, TreeShape
from prism_trt.engines.protocol import DraftOutput, LogitsFor, TargetOutput, TokenBatch, Tree
from prism_trt.engines.tensorrt.binding import (
    Call,
    NetworkLimits,
    calls_of,
    common_inputs,
    pool_inputs,
    slot_inputs,
)
from prism_trt.engines.tensorrt.names import (
    FEATURES,
    GREEDY,
    HIDDEN,
    LOGITS,
    NEXT_HIDDEN,
    PICKED,
    STEP,
    TREE_DEPTHS,
    TREE_LOG_PROBS,
    TREE_MASK,
    TREE_PARENTS,
    TREE_TOKENS,
)
from prism_trt.speculative.tree import grow_tree_stepwise
from prism_trt.target.config import TargetConfig
from prism_trt.target.model import KVPool


class Executable(Protocol):
    """A network that can be run."""

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run on inputs by name, K/V views included, which are updated in place; the other outputs by name."""
        ...


class NetworkEngine:
    """A target network and, with a drafter, its step network, over K/V pools in the networks' type."""

    default_tree = TreeShape()

    def __init__(
        self,
        config: TargetConfig,
        drafter: DrafterConfig | None,
        draft_vocab: Tensor | None,
        limits: NetworkLimits,
        target: Executable,
        step: Executable | None,
        device: torch.device,
        dtype: torch.dtype,
        plugins: bool = False,
    ) -> None:
        """Allocate the pools for networks that were emitted for `config`, `drafter` and `limits.capacity`.

        `plugins` says that the step network is of the form with plugins.
        """
        self.device = device
        self.limits = limits.engine
        self.vocab_size = config.vocab_size
        self.has_drafter = drafter is not None
        self.draft_vocab = None if draft_vocab is None else draft_vocab.to(device)
        # What the target network gives is fused already, so features are as wide as hidden states.
        self.feature_size = self.hidden_size = config.hidden_size
        self._network_limits = limits
        self._dtype = dtype
        self._target = target
        self._pool = _allocate(config.num_layers, config.num_kv_heads, config.head_dim, limits, dtype, device)
        self._step = step
        self._plugins = plugins
        if drafter is not None:
            self.hidden_size = drafter.hidden_size
            self._reads_hidden = drafter.features != "none"
            self._many_modules = drafter.num_modules > 1
            layers, kv_heads, head_dim = drafter.num_layers, drafter.num_kv_heads, drafter.head_dim
            self._draft_pool = _allocate(layers, kv_heads, head_dim, limits, dtype, device)

    def forward(self, batch: TokenBatch, logits_for: LogitsFor = "all") -> TargetOutput:
        """See `prism_trt.engines.protocol.Engine.forward`.

        Raises:
            PrismError: the call exceeds the engine's limits.
            ValueError: two rows share a slot, or a slot does not exist.
        """
        outputs = []
        for call in calls_of(batch, self._network_limits):
            inputs = self._inputs(call, self._pool) | {PICKED: _picked(call, logits_for == "all")}
            outputs.append((call, self._target.run(inputs)))
        features = _joined(batch, outputs, FEATURES)
        features = features.float() if self._dtype == torch.float16 else features
        if logits_for == "none":
            return TargetOutput(features, None, None)
        return TargetOutput(features, _joined(batch, outputs, LOGITS), _joined(batch, outputs, GREEDY).long())

    def commit(self, slots: Tensor, lengths: Tensor, accepted: Tensor, counts: Tensor) -> None:
        """See `prism_trt.engines.protocol.Engine.commit`."""
        for slot, length, path, count in zip(slots.tolist(), lengths.tolist(), accepted, counts.tolist(), strict=True):
            self._pool.move(slot, length + path[:count], length)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """See `prism_trt.engines.protocol.PrefixCopyEngine.copy_prefix`."""
        self._pool.copy(source, target, length)
        if self._step is not None:
            self._draft_pool.copy(source, target, length)

    def extend(self, batch: TokenBatch, features: Tensor) -> DraftOutput:
        """See `prism_trt.engines.protocol.Engine.extend`; raises as `forward` does."""
        return self._draft(0, batch, features, all_tokens=False)

    def step(self, k: int, batch: TokenBatch, hidden: Tensor) -> DraftOutput:
        """See `prism_trt.engines.protocol.Engine.step`; raises as `forward` does."""
        return self._draft(k, batch, hidden, all_tokens=True)

    def _draft(self, k: int, batch: TokenBatch, hidden: Tensor, all_tokens: bool) -> DraftOutput:
        if self._step is None:
            raise ValueError("this engine has no drafter")
        outputs = []
        for call in calls_of(batch, self._network_limits, idle_rows=not self._plugins):
            if self._plugins:
                inputs = slot_inputs(call, self._draft_pool)
            else:
                inputs = self._inputs(call, self._draft_pool)
            inputs |= self._hidden(call, hidden) | {PICKED: _picked(call, all_tokens)}
            if self._many_modules:
                shape = call.batch.tokens.shape if self._plugins else (1,)
                inputs[STEP] = torch.full(shape, k, dtype=torch.int32, device=self.device)
            outputs.append((call, self._step.run(inputs)))
        return DraftOutput(_joined(batch, outputs, LOGITS), _joined(batch, outputs, NEXT_HIDDEN))

    def _inputs(self, call: Call, pool: KVPool) -> dict[str, Tensor]:
        return common_inputs(call, self._network_limits, self._dtype) | pool_inputs(call, pool)

    def _hidden(self, call: Call, hidden: Tensor) -> dict[str, Tensor]:
        if not self._reads_hidden:
            return {}
        return {HIDDEN: call.spread(hidden[call.indices, : call.batch.tokens.shape[1]].to(self._dtype))}


class FusedNetworkEngine(NetworkEngine):
    """A `NetworkEngine` whose round network drafts trees of its own shape in one call."""

    def __init__(
        self,
        config: TargetConfig,
        drafter: DrafterConfig,
        draft_vocab: Tensor | None,
        limits: NetworkLimits,
        target: Executable,
        step: Executable,
        draft_round: Executable,
        shape: TreeShape,
        device: torch.device,
        dtype: torch.dtype,
        plugins: bool = False,
    ) -> None:
        """As `NetworkEngine`, with the round network that was emitted for `shape`, which becomes the default tree."""
        super().__init__(config, drafter, draft_vocab, limits, target, step, device, dtype, plugins)
        self._round = draft_round
        self.default_tree = shape

    def draft_round(self, batch: TokenBatch, features: Tensor, shape: TreeShape) -> Tree:
        """See `prism_trt.engines.protocol.FusedDraftEngine.draft_round`; other shapes are drafted step by step."""
        if shape != self.default_tree:
            return grow_tree_stepwise(self, batch, features, shape)
        outputs = []
        for call in calls_of(batch, self._network_limits):
            inputs = self._inputs(call, self._draft_pool) | self._hidden(call, features)
            inputs[PICKED] = _picked(call, all_tokens=False)
            outputs.append((call, self._round.run(inputs)))
        return Tree(
            tokens=_joined(batch, outputs, TREE_TOKENS).long(),
            parents=_joined(batch, outputs, TREE_PARENTS).long(),
            depths=_joined(batch, outputs, TREE_DEPTHS).long(),
            mask=_joined(batch, outputs, TREE_MASK),
            log_probs=_joined(batch, outputs, TREE_LOG_PROBS),
        )


def _allocate(
    layers: int, kv_heads: int, head_dim: int, limits: NetworkLimits, dtype: torch.dtype, device: torch.device
) -> KVPool:
    return KVPool.allocate(layers, limits.slots, kv_heads, limits.capacity, head_dim, dtype, device)


def _picked(call: Call, all_tokens: bool) -> Tensor:
    """[B, T] int32, or [B, 1]: each row's last valid token (0 in idle rows)."""
    if all_tokens:
        tokens = call.batch.tokens.shape[1]
        return torch.arange(tokens, dtype=torch.int32, device=call.batch.tokens.device).repeat(call.rows, 1)
    return call.spread((call.batch.counts - 1)[:, None]).to(torch.int32)


def _joined(batch: TokenBatch, outputs: list[tuple[Call, dict[str, Tensor]]], name: str) -> Tensor:
    """The output `name` for the batch's rows in their order, [b, ...]; rows of separate calls are padded with zeros."""
    if len(outputs) == 1:
        call, output = outputs[0]
        return output[name][call.places]
    pieces = [output[name] for _, output in outputs]
    longest = max(piece.shape[1] for piece in pieces)
    joined = pieces[0].new_zeros(len(pieces), longest, *pieces[0].shape[2:])
    for row, piece in enumerate(pieces):
        joined[row, : piece.shape[1]] = piece[0]
    return joined
