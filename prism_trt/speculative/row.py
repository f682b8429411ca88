"""The state of one request in the decoding loop."""

from __future__ import annotations

from torch import Tensor

from prism_trt.speculative.kv_pool import Prefix
from prism_trt.speculative.log_probs import ScoredToken, score_tokens
from prism_trt.speculative.planner import Plan
from prism_trt.speculative.request import Request, Statistics
from prism_trt.speculative.sampling import make_generator
from prism_trt.speculative.stopping import StopRule


class Row:
    """A request inside the decoder."""

    def __init__(self, number: int, request: Request, tree: Plan, planned: bool, stop: StopRule) -> None:
        self.id = number
        self.request = request
        self.tree = tree
        """Of every round, unless they are planned."""
        self.planned = planned
        self.stop = stop
        self.slot = -1
        self.length = 0
        """Target K/V entries; after the prefill also the index of the last token."""
        self.draft_length = 0
        self.sequence = list(request.prompt)
        """All committed tokens."""
        self.root = -1
        """The last committed token, not yet in the target's K/V."""
        self.pending: list[int] = []
        """Committed tokens not yet in the draft K/V; kept only when the drafter may need them."""
        self.pending_features: list[Tensor] = []
        """[1, T, F] pieces: the features that precede them."""
        self.generator = make_generator(request.sampling)
        self.collected: list[Tensor] = []
        self.scored: list[ScoredToken] = []
        """The tokens of the latest pass."""
        self.stats = Statistics(len(request.prompt))
        self.started = 0.0
        self.first_token = 0.0

    @property
    def drafts(self) -> bool:
        """Whether the drafter may ever be used."""
        return self.planned or self.tree is not None

    @property
    def prefix(self) -> Prefix:
        """What its slot holds between rounds."""
        return Prefix(self.sequence, self.length, self.draft_length)

    @property
    def fusable(self) -> bool:
        """Whether tokens alone are all that a round must give."""
        return self.generator is None and self.request.log_probs is None

    def score(self, logits: Tensor | None, index: int, places: list[int], tokens: list[int]) -> None:
        """Keep the log-probabilities of `tokens`, if they are asked for, by ``logits[index, places]``."""
        if self.request.log_probs is not None:
            assert logits is not None
            self.scored = score_tokens(logits[index, places], tokens, self.request.log_probs)
