"""Our own engine as one of the contestants."""

from __future__ import annotations

import time

import torch

import prism_trt
from prism_trt.bench.peers.timing import Timing
from prism_trt.config import TreeShape
from prism_trt.engines.protocol import Engine, LogitsFor, TokenBatch
from prism_trt.speculative.decoder import Request, generate


class EnginePeer:
    """An engine decoding plainly (`tree` None) or with drafts."""

    version = prism_trt.__version__

    def __init__(self, name: str, engine: Engine, tree: TreeShape | None) -> None:
        self.name = name
        self._engine = engine
        self._tree = tree

    def decode(self, prompt: list[int], tokens: int) -> Timing:
        """Greedy decoding of exactly `tokens` tokens."""
        (result,) = generate(self._engine, [Request(prompt, tokens, tree=self._tree)])
        return Timing(result.tokens, result.statistics.prefill_seconds, result.statistics.decode_seconds)

    def time_pass(self, tokens: list[int], context: int) -> float:
        """See `prism_trt.bench.peers.timing.Peer.time_pass`."""
        self._forward(tokens[:context], 0, "none")
        start = time.perf_counter()
        self._forward(tokens[context:], context, "all" if context else "last")
        return time.perf_counter() - start

    def _forward(self, tokens: list[int], length: int, logits_for: LogitsFor) -> None:
        limit = self._engine.limits.tokens_per_call
        for first in range(0, len(tokens), limit):
            chunk = torch.tensor(tokens[first : first + limit], device=self._engine.device)
            last = first + limit >= len(tokens)
            self._engine.forward(TokenBatch.one_row(chunk, length + first), logits_for if last else "none")
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)
