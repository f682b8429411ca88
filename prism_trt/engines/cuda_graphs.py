"""The torch engine with recorded calls: on a GPU each replays one CUDA graph instead of launching every kernel.

Short calls are padded to a few sizes (rows, tokens, readable entries) and recorded once per size; long prefills run as
they are. Padding tokens write to an entry behind the slot's context, and padding rows do so in slot 0. Which slots a
call names is data, so recordings serve all of them.

A recorded call computes what the plain one does, with matrices of other sizes. Kernels for other sizes may round
differently, as those for a tree and for a single token do anyway: in 16-bit types, words of nearly equal logits can
then change places between decoding with and without drafting. float32 makes that rare.

Shape legend: B rows, T tokens per row, W readable entries; primed, they are padded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from prism_trt.drafter.model import Drafter
from prism_trt.engines.protocol import DraftOutput, EngineLimits, LogitsFor, TargetOutput, TokenBatch
from prism_trt.engines.recordings import Record, Recordings, Tensors, bucket, padded
from prism_trt.engines.torch_engine import TorchEngine, last_valid
from prism_trt.errors import PrismError
from prism_trt.target.loading import Target
from prism_trt.target.model import KVPool, PoolAccess

_MOST_TOKENS = 64
"""Longer rows keep a GPU busy for longer than their launches take."""
_LEAST_ENTRIES = 256

_TOKENS, _POSITIONS, _SLOTS, _ENTRIES, _COUNTS, _MASK = "tokens", "positions", "slots", "entries", "counts", "mask"
_HIDDEN, _FEATURES, _LOGITS, _GREEDY = "hidden", "features", "logits", "greedy"


@dataclass(frozen=True)
class PaddedCall:
    """A batch padded to the sizes of a recording."""

    sizes: tuple[int, int, int]
    """B', T', W'."""
    tensors: Tensors
    """Tokens, positions, entries [B', T'], slots, counts [B'] int64, and the mask [B', 1, T', W'] bool."""

    @classmethod
    def of(cls, batch: TokenBatch, pool: KVPool, limits: EngineLimits) -> PaddedCall | None:
        """None when the batch is too long to be recorded.

        Args:
            pool: has an entry ``limits.context`` that belongs to nobody.

        Raises:
            PrismError: a token lies outside the context.
            ValueError: two rows share a slot, or a slot is not in the pool.
        """
        access = PoolAccess.of(batch, pool)
        if access.window > limits.context:
            raise PrismError(
                f"the call needs {access.window} K/V entries but the context has {limits.context}: shorten the prompt "
                "or build the engine with a larger context"
            )
        rows, tokens = batch.tokens.shape
        more_rows, more_tokens = bucket(rows, 1, limits.slots), bucket(tokens, 1, _MOST_TOKENS)
        window = bucket(access.window, _LEAST_ENTRIES, limits.context)
        if more_rows is None or more_tokens is None or window is None:
            return None
        columns = torch.arange(tokens, device=batch.tokens.device)
        entries = batch.lengths[:, None] + batch.offset + columns
        entries = entries.masked_fill(columns >= batch.counts[:, None], limits.context)
        mask = access.mask
        if mask is None:
            mask = torch.ones(rows, 1, tokens, access.window, dtype=torch.bool, device=batch.tokens.device)
        # Padding reads everything, since a softmax over nothing is not a number.
        size = (more_rows, more_tokens)
        tensors = {
            _TOKENS: padded(batch.tokens, size),
            _POSITIONS: padded(batch.positions, size),
            _ENTRIES: padded(entries, size, limits.context),
            _SLOTS: padded(batch.slots, size[:1]),
            _COUNTS: padded(batch.counts, size[:1], 1),
            _MASK: padded(padded(mask, (None, None, None, window)), (more_rows, None, more_tokens), True),
        }
        return cls((more_rows, more_tokens, window), tensors)


class GraphedTorchEngine(TorchEngine):
    """A `TorchEngine` that records its short calls."""

    _spare_entries = 1

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        limits: EngineLimits,
        device: torch.device,
        dtype: torch.dtype,
        record: Record,
        feature_layers: tuple[int, ...] | None = None,
    ) -> None:
        """As `TorchEngine`; calls are recorded by `record`."""
        super().__init__(target, drafter, limits, device, dtype, feature_layers)
        self.recordings = Recordings(record)

    @torch.inference_mode()
    def forward(self, batch: TokenBatch, logits_for: LogitsFor = "all") -> TargetOutput:
        """See `prism_trt.engines.protocol.Engine.forward`; raises as `TorchEngine.forward` does."""
        self._check_size(batch)
        call = PaddedCall.of(batch, self._pool, self.limits)
        if call is None:
            return super().forward(batch, logits_for)
        run = partial(self._recorded_forward, logits_for)
        outputs = self._replay(call, ("forward", logits_for), {}, run)
        rows, tokens = batch.tokens.shape
        features = outputs[_FEATURES][:rows, :tokens]
        if logits_for == "none":
            return TargetOutput(features, None, None)
        return TargetOutput(features, outputs[_LOGITS][:rows, :tokens], outputs[_GREEDY][:rows, :tokens])

    @torch.inference_mode()
    def extend(self, batch: TokenBatch, features: Tensor) -> DraftOutput:
        """See `prism_trt.engines.protocol.Engine.extend`; raises as `forward` does."""
        return self._drafted(0, batch, features) or super().extend(batch, features)

    @torch.inference_mode()
    def step(self, k: int, batch: TokenBatch, hidden: Tensor) -> DraftOutput:
        """See `prism_trt.engines.protocol.Engine.step`; raises as `forward` does."""
        return self._drafted(k, batch, hidden) or super().step(k, batch, hidden)

    def _drafted(self, k: int, batch: TokenBatch, hidden: Tensor) -> DraftOutput | None:
        """The output of a draft step; None when it is too long to be recorded."""
        if self._drafter is None:
            raise ValueError("this engine has no drafter")
        self._check_size(batch)
        call = PaddedCall.of(batch, self._draft_pool, self.limits)
        if call is None:
            return None
        rows, tokens = batch.tokens.shape
        given = padded(hidden[:, :tokens].to(self._dtype), call.sizes[:2])
        # Step 0 alone fuses features and predicts from the last token only.
        key = ("extend",) if k == 0 else ("step", self._drafter.module_of_step(k))
        outputs = self._replay(call, key, {_HIDDEN: given}, partial(self._recorded_draft, k))
        return DraftOutput(outputs[_LOGITS][:rows, :tokens], outputs[_HIDDEN][:rows, :tokens])

    def _replay(
        self, call: PaddedCall, key: tuple[Hashable, ...], more: Tensors, run: Callable[[Tensors], Tensors]
    ) -> Tensors:
        return self.recordings.run(key, {**call.tensors, **more}, lambda memory: partial(run, memory))

    def _recorded_forward(self, logits_for: LogitsFor, inputs: Tensors) -> Tensors:
        final, features = self._target.forward_resolved(
            inputs[_TOKENS], inputs[_POSITIONS], _access(inputs), self._pool, self.feature_layers
        )
        if logits_for == "none":
            return {_FEATURES: features}
        logits = self._target.head(final if logits_for == "all" else last_valid(final, inputs[_COUNTS]))
        return {_FEATURES: features, _LOGITS: logits, _GREEDY: logits.argmax(dim=-1)}

    def _recorded_draft(self, k: int, inputs: Tensors) -> Tensors:
        hidden = self._run_module(k, inputs[_TOKENS], inputs[_POSITIONS], _access(inputs), inputs[_HIDDEN])
        output = self._predict(hidden if k else last_valid(hidden, inputs[_COUNTS]))
        return {_LOGITS: output.logits, _HIDDEN: output.hidden}


def _access(inputs: Tensors) -> PoolAccess:
    """Access to the pool by the tensors of a `PaddedCall`."""
    entries, mask = inputs[_ENTRIES], inputs[_MASK]
    rows, columns = (torch.arange(size, device=entries.device) for size in entries.shape)
    slots = inputs[_SLOTS]
    scatter = (rows[:, None], columns[None], slots[:, None], entries)
    return PoolAccess(slots=slots, span=None, scatter=scatter, window=mask.shape[3], mask=mask)
