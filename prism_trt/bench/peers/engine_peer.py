"""Our own engine as one of the contestants."""

from __future__ import annotations

import prism_trt
from prism_trt.bench.peers.timing import Timing
from prism_trt.config import TreeShape
from prism_trt.engines.protocol import Engine
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
