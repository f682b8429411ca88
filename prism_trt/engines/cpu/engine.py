"""`CpuEngine`: the engine protocol on the compiled C++ library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from prism_trt.config import TreeShape
from prism_trt.engines.cpu.library import Dims, Library
from prism_trt.engines.protocol import DraftOutput, EngineLimits, LogitsFor, RoundOutput, TargetOutput, TokenBatch, Tree

_LOGITS_FOR = {"none": 0, "last": 1, "all": 2}


class CpuEngine:
    """Target and drafter of one weight file on this machine's processor.

    `TargetOutput.logits` and `DraftOutput.logits` are views of buffers that the next call overwrites.
    """

    device = torch.device("cpu")
    default_tree = TreeShape()

    def __init__(
        self,
        library: Path,
        weights: Path,
        dims: Dims,
        step_map: Sequence[int],
        feature_layers: Sequence[int],
        draft_vocab: Tensor | None,
    ) -> None:
        """Load the compiled `library` with `weights`.

        Args:
            feature_layers: numbers of the hidden states given as features (see `prism_trt.drafter.features`).
            draft_vocab: [D] int64, maps draft ids to target ids.

        Raises:
            PrismError: the library or the weights do not load.
        """
        self.draft_vocab = draft_vocab
        self.has_drafter = dims.modules > 0
        self.limits = EngineLimits(slots=dims.slots, context=dims.context, tokens_per_call=dims.tokens)
        self.vocab_size = dims.vocab
        self.feature_layers = tuple(feature_layers)
        self.feature_size = len(feature_layers) * dims.hidden
        self.hidden_size = dims.draft_hidden or dims.hidden
        self._draft_size = dims.draft_vocab
        identity = range(dims.draft_vocab) if draft_vocab is None else draft_vocab.tolist()
        self._library = Library(library, dims, step_map, feature_layers, identity, weights)
        self.isa = self._library.isa
        self.threads = dims.threads
        self._logits = torch.empty(0)
        self._draft_logits = torch.empty(0)

    def forward(self, batch: TokenBatch, logits_for: LogitsFor = "all") -> TargetOutput:
        """See `prism_trt.engines.protocol.Engine.forward`; features are bfloat16.

        Raises:
            PrismError: the batch exceeds the engine's limits.
        """
        rows, stride = batch.tokens.shape
        call = _BatchArguments(batch)
        features = torch.empty(rows, stride, self.feature_size, dtype=torch.bfloat16)
        logits = greedy = None
        if logits_for != "none":
            outputs = stride if logits_for == "all" else 1
            logits = self._logits = _at_least(self._logits, rows * outputs * self.vocab_size)
            logits = logits[: rows * outputs * self.vocab_size].view(rows, outputs, self.vocab_size)
            greedy = torch.zeros(rows, outputs, dtype=torch.int64)
        self._library.call(
            "prism_forward",
            *call.arguments,
            _LOGITS_FOR[logits_for],
            features.data_ptr(),
            None if logits is None else logits.data_ptr(),
            None if greedy is None else greedy.data_ptr(),
        )
        return TargetOutput(features, logits, greedy)

    def commit(self, slots: Tensor, lengths: Tensor, accepted: Tensor, counts: Tensor) -> None:
        """See `prism_trt.engines.protocol.Engine.commit`."""
        slots, lengths, accepted, counts = (tensor.contiguous() for tensor in (slots, lengths, accepted, counts))
        pointers = (slots.data_ptr(), lengths.data_ptr(), accepted.data_ptr(), counts.data_ptr())
        self._library.call("prism_commit", accepted.shape[0], *pointers, accepted.shape[1])

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """See `prism_trt.engines.protocol.PrefixCopyEngine.copy_prefix`."""
        self._library.call("prism_copy_prefix", source, target, length)

    def extend(self, batch: TokenBatch, features: Tensor) -> DraftOutput:
        """See `prism_trt.engines.protocol.Engine.extend`."""
        return self._draft(0, batch, features, last_only=True)

    def step(self, k: int, batch: TokenBatch, hidden: Tensor) -> DraftOutput:
        """See `prism_trt.engines.protocol.Engine.step`."""
        return self._draft(k, batch, hidden, last_only=False)

    def _draft(self, k: int, batch: TokenBatch, hidden: Tensor, last_only: bool) -> DraftOutput:
        rows, stride = batch.tokens.shape
        outputs = 1 if last_only else stride
        call = _BatchArguments(batch)
        hidden = hidden.to(torch.bfloat16).contiguous()
        size = rows * outputs * self._draft_size
        self._draft_logits = _at_least(self._draft_logits, size)
        logits = self._draft_logits[:size].view(rows, outputs, self._draft_size)
        hidden_out = torch.empty(rows, outputs, self.hidden_size, dtype=torch.bfloat16)
        self._library.call(
            "prism_draft",
            *call.arguments,
            k,
            hidden.data_ptr(),
            int(last_only),
            logits.data_ptr(),
            hidden_out.data_ptr(),
        )
        return DraftOutput(logits, hidden_out)

    def draft_round(self, batch: TokenBatch, features: Tensor, shape: TreeShape) -> Tree:
        """See `prism_trt.engines.protocol.FusedDraftEngine.draft_round`."""
        rows = batch.tokens.shape[0]
        tokens, parents, depths = torch.empty(3, rows, shape.size, dtype=torch.int64)
        mask = torch.empty(rows, shape.size, shape.size, dtype=torch.bool)
        log_probs = torch.empty(rows, shape.size)
        numbers = (shape.depth, shape.width, shape.size)
        self._round("prism_draft_round", batch, features, numbers, tokens, parents, depths, mask, log_probs)
        return Tree(tokens, parents, depths, mask, log_probs)

    def speculate(self, batch: TokenBatch, features: Tensor, shape: TreeShape) -> RoundOutput:
        """See `prism_trt.engines.protocol.FusedRoundEngine.speculate`."""
        rows = batch.tokens.shape[0]
        tokens = torch.zeros(rows, shape.depth + 1, dtype=torch.int64)
        counts, drafted = torch.empty(2, rows, dtype=torch.int64)
        committed = torch.empty(rows, shape.depth + 1, self.feature_size, dtype=torch.bfloat16)
        numbers = (shape.depth, shape.width, shape.size, shape.min_probability)
        self._round("prism_speculate", batch, features, numbers, tokens, counts, drafted, committed)
        return RoundOutput(tokens, counts, drafted, committed)

    def _round(
        self, name: str, batch: TokenBatch, features: Tensor, shape: tuple[float, ...], *outputs: Tensor
    ) -> None:
        call = _BatchArguments(batch)
        rows, slots, lengths, counts, stride, _, _, tokens, positions = call.arguments
        features = features.to(torch.bfloat16).contiguous()
        self._library.call(
            name,
            *(rows, slots, lengths, counts, stride, tokens, positions, features.data_ptr()),
            *shape,
            *(output.data_ptr() for output in outputs),
        )


class _BatchArguments:
    """The C arguments of a `TokenBatch`; holds the tensors so that the pointers stay valid during the call."""

    def __init__(self, batch: TokenBatch) -> None:
        rows, stride = batch.tokens.shape
        tensors = (batch.slots, batch.lengths, batch.counts, batch.tokens, batch.positions)
        slots, lengths, counts, tokens, positions = self._alive = tuple(tensor.contiguous() for tensor in tensors)
        self._mask = None if batch.mask is None else batch.mask.contiguous()
        self.arguments: tuple[int | None, ...] = (
            *(rows, slots.data_ptr(), lengths.data_ptr(), counts.data_ptr(), stride, batch.offset),
            None if self._mask is None else self._mask.data_ptr(),
            *(tokens.data_ptr(), positions.data_ptr()),
        )


def _at_least(buffer: Tensor, size: int) -> Tensor:
    """`buffer`, or a new float32 buffer when it holds fewer than `size` elements."""
    return buffer if buffer.numel() >= size else torch.empty(size)
