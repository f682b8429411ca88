"""A small complete engine whose outputs reveal every misuse of the K/V contract.

Its "attention" sums, in float64, what each visible entry holds: an embedding of the token turned by its position. A
wrong token, position, mask, length or commit thus changes the features. Unwritten and padding entries are NaN, which
spreads to whatever reads them; writing past the context raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_trt.config import TreeShape
from prism_trt.engines.protocol import DraftOutput, EngineLimits, LogitsFor, TargetOutput, TokenBatch, Tree
from prism_trt.speculative.tree import grow_tree_stepwise

HIDDEN = 8


class BagEngine:
    """`Engine` with random weights from `seed`; the drafter is the better the smaller `noise` is."""

    def __init__(
        self,
        seed: int = 0,
        vocab: int = 40,
        draft_vocab: list[int] | None = None,
        slots: int = 4,
        context: int = 96,
        tokens_per_call: int = 64,
        noise: float = 0.3,
        modules: int = 2,
        has_drafter: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.device = torch.device("cpu")
        self.limits = EngineLimits(slots, context, tokens_per_call)
        self.vocab_size = vocab
        self.feature_size = self.hidden_size = HIDDEN
        self.has_drafter = has_drafter
        self.draft_vocab = None if draft_vocab is None else torch.tensor(draft_vocab)
        self.embedding, self.head, self.frequency = random(vocab, HIDDEN), random(HIDDEN, vocab), random(HIDDEN)
        self.fuse = [torch.eye(HIDDEN, dtype=torch.float64) + noise * random(HIDDEN, HIDDEN) for _ in range(modules)]
        self.target_pool = torch.full((slots, context, HIDDEN), torch.nan, dtype=torch.float64)
        self.draft_pool = self.target_pool.clone()
        self.default_tree = TreeShape(depth=3, width=2, size=6)
        self._logits = torch.empty(0)
        self.calls: list[tuple[str, int]] = []
        """Name and B*T of each call."""

    def forward(self, batch: TokenBatch, logits_for: LogitsFor = "all") -> TargetOutput:
        self._record("forward", batch)
        own = self.embedding[batch.tokens]
        features = self._attend(self.target_pool, batch, own)
        if logits_for == "none":
            return TargetOutput(features.float(), None, None)
        read = features if logits_for == "all" else _at_last(features, batch.counts)
        self._logits = logits = (2 * read @ self.head).float()
        return TargetOutput(features.float(), logits, logits.argmax(-1))

    def commit(self, slots: Tensor, lengths: Tensor, accepted: Tensor, counts: Tensor) -> None:
        for slot, length, path, count in zip(slots.tolist(), lengths.tolist(), accepted, counts.tolist(), strict=True):
            source = path[:count] + length
            assert (source.diff() > 0).all()
            self.target_pool[slot, length : length + count] = self.target_pool[slot, source]
            self.target_pool[slot, length + count :] = torch.nan

    def extend(self, batch: TokenBatch, features: Tensor) -> DraftOutput:
        self._record("extend", batch)
        output = self._draft(0, batch, features)
        return DraftOutput(_at_last(output.logits, batch.counts), _at_last(output.hidden, batch.counts))

    def step(self, k: int, batch: TokenBatch, hidden: Tensor) -> DraftOutput:
        self._record("step", batch)
        return self._draft(min(k, len(self.fuse) - 1), batch, hidden)

    def _draft(self, module: int, batch: TokenBatch, hidden: Tensor) -> DraftOutput:
        own = self.embedding[batch.tokens] + 0.2 * hidden.double() @ self.fuse[module]
        mixed = self._attend(self.draft_pool, batch, own)
        head = self.head if self.draft_vocab is None else self.head[:, self.draft_vocab]
        return DraftOutput((2 * mixed @ head).float(), mixed.float())

    def _attend(self, pool: Tensor, batch: TokenBatch, own: Tensor) -> Tensor:
        rows, width = batch.tokens.shape
        entry = own * torch.cos(batch.positions[:, :, None] * self.frequency)
        valid = torch.arange(width) < batch.counts[:, None]
        entry = torch.where(valid[:, :, None], entry, torch.nan)
        start = batch.lengths + batch.offset
        index = (start[:, None] + torch.arange(width)).expand(rows, width)
        fits = valid | (index < pool.shape[1])  # padding may fall outside, valid entries may not
        pool[batch.slots[:, None].expand(rows, width)[fits], index[fits]] = entry[fits]

        span = int(start.max()) + width
        place = torch.arange(span).expand(rows, width, span)
        if batch.mask is None:
            assert batch.offset == 0
            visible = place <= (batch.lengths[:, None] + torch.arange(width))[:, :, None]
        else:
            assert batch.mask.shape == (rows, width, batch.offset + width)
            visible = place < batch.lengths[:, None, None]
            flight = batch.lengths[:, None, None] + torch.arange(batch.offset + width)
            visible = visible.scatter(2, flight.expand_as(batch.mask), batch.mask)
        stored = torch.nn.functional.pad(pool[batch.slots], (0, 0, 0, max(0, span - pool.shape[1])), value=torch.nan)
        seen = torch.where(visible[:, :, :, None], stored[:, None, :span], 0.0).sum(2)
        return torch.tanh(own + 0.3 * seen)

    def _record(self, name: str, batch: TokenBatch) -> None:
        assert batch.tokens.numel() <= self.limits.tokens_per_call, "call larger than the engine allows"
        self._logits.fill_(torch.nan)  # the protocol allows the next call to overwrite them
        self.calls.append((name, batch.tokens.numel()))


class FusedBagEngine(BagEngine):
    """The same engine offering `draft_round`."""

    def draft_round(self, batch: TokenBatch, features: Tensor, shape: TreeShape) -> Tree:
        self.calls.append(("draft_round", batch.tokens.numel()))
        return grow_tree_stepwise(self, batch, features, shape)


def _at_last(values: Tensor, counts: Tensor) -> Tensor:
    return values[torch.arange(len(counts)), counts - 1][:, None]
