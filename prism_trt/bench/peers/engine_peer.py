"""Our own engine as one of the contestants."""

from __future__ import annotations

import prism_trt
from prism_trt.bench.peers.timing import Timing
from prism_trt.bench.results import BenchSettings
from prism_trt.bench.runner import answer
from prism_trt.config import TreeShape
from prism_trt.engines.protocol import Engine


class EnginePeer:
    """An engine decoding plainly (`tree` None) or with drafts."""

    version = prism_trt.__version__

    def __init__(self, name: str, engine: Engine, tree: TreeShape | None) -> None:
        self.name = name
        self._engine = engine
        self._tree = tree

    def decode(self, prompt: list[int], tokens: int) -> Timing:
        """Greedy decoding of exactly `tokens` tokens."""
        settings = BenchSettings(trees=(self._tree or TreeShape(),), max_new_tokens=tokens)
        generation = answer(self._engine, prompt, self._tree, settings, ())
        counts = generation.result.statistics
        return Timing(generation.tokens, counts.prefill_seconds, counts.decode_seconds)
