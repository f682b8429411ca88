"""Greedy rounds along answers that are known already: what a drafter gets accepted, without the target's passes.

Greedy output is the target's own whatever is drafted, so a tree's accepted path is the part of it that the target's
answer goes along, and the features that the next round starts from are those of the answer. With an engine whose
results do not depend on how a sequence is cut into calls, every count is the one that decoding gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_trt.config import TreeShape
from prism_trt.engines.protocol import DraftOutput, Engine, LogitsFor, TargetOutput, TokenBatch, Tree
from prism_trt.speculative.decoder import Request, generate
from prism_trt.speculative.tree import grow_tree

_UNKNOWN = -1
"""Stands for the target's choice after a token that its answer does not contain."""


@dataclass(frozen=True)
class KnownAnswer:
    """A prompt with the target's greedy answer."""

    tokens: Tensor
    """[T] int64, prompt and answer."""
    features: Tensor
    """[T - 1, F]: the target's features of all tokens but the last."""


def known_answers(engine: Engine, prompts: Sequence[list[int]], tokens: int) -> list[KnownAnswer]:
    """The target's greedy answers of `tokens` tokens each, which go on behind an end of sequence."""
    requests = [Request(prompt, tokens, collect_features=True) for prompt in prompts]
    answers = []
    for request, result in zip(requests, generate(engine, requests), strict=True):
        assert result.features is not None
        answers.append(KnownAnswer(torch.tensor([*request.prompt, *result.tokens]), result.features))
    return answers


class ReplayEngine:
    """An `Engine` with the drafter of another, whose target only knows some answers.

    After tokens of no known answer the target's choice is -1, which no draft equals.
    """

    def __init__(self, engine: Engine, answers: Sequence[KnownAnswer]) -> None:
        """Take the drafter of `engine`, whose features must be those of `answers`."""
        self._engine = engine
        self._answers = answers
        self._running: dict[int, tuple[list[int], KnownAnswer]] = {}
        """By slot: the prompt as far as it was given, and an answer that begins so."""
        self.device, self.limits = engine.device, engine.limits
        self.vocab_size, self.feature_size = engine.vocab_size, engine.feature_size
        self.hidden_size = engine.hidden_size
        self.has_drafter, self.draft_vocab = engine.has_drafter, engine.draft_vocab
        self.default_tree = engine.default_tree

    def forward(self, batch: TokenBatch, logits_for: LogitsFor = "all") -> TargetOutput:
        """See `Engine.forward`; without logits."""
        rows, count = batch.tokens.shape
        features = torch.zeros(rows, count, self.feature_size, dtype=self._answers[0].features.dtype)
        greedy = torch.full((rows, count), _UNKNOWN)
        for b in range(rows):
            answer = self._answer(batch, b)
            known = len(answer.features)
            positions = batch.positions[b]
            inside = positions < known
            at = positions.clamp(max=known - 1)
            right = inside & (answer.tokens[at] == batch.tokens[b])
            if batch.mask is not None:
                right = ~(batch.mask[b] & ~right).any(1)
            features[b, right] = answer.features[at[right]]
            greedy[b, right] = answer.tokens[at[right] + 1]
        if logits_for == "last":
            greedy = greedy.gather(1, (batch.counts - 1)[:, None])
        return TargetOutput(features, None, greedy)

    def commit(self, slots: Tensor, lengths: Tensor, accepted: Tensor, counts: Tensor) -> None:
        """See `Engine.commit`: there is no K/V of a target."""

    def extend(self, batch: TokenBatch, features: Tensor) -> DraftOutput:
        """See `Engine.extend`."""
        return self._engine.extend(batch, features)

    def step(self, k: int, batch: TokenBatch, hidden: Tensor) -> DraftOutput:
        """See `Engine.step`."""
        return self._engine.step(k, batch, hidden)

    def draft_round(self, batch: TokenBatch, features: Tensor, shape: TreeShape) -> Tree:
        """See `FusedDraftEngine.draft_round`."""
        return grow_tree(self._engine, batch, features, shape)

    def _answer(self, batch: TokenBatch, row: int) -> KnownAnswer:
        slot, length = int(batch.slots[row]), int(batch.lengths[row])
        given, answer = self._running.get(slot, ([], None))
        if batch.mask is None and length <= len(given):  # of a prompt
            given = given[:length] + batch.tokens[row, : int(batch.counts[row])].tolist()
            answer = next(known for known in self._answers if known.tokens[: len(given)].tolist() == given)
            self._running[slot] = given, answer
        assert answer is not None
        return answer
