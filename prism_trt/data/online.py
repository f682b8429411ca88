"""Features computed by the target while the drafter trains, instead of read from disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from prism_trt.data.feature_cache import FeatureCache
from prism_trt.data.sequences import FeatureSequence
from prism_trt.engines.protocol import Engine, TokenBatch
from prism_trt.errors import PrismError


class OnlineFeatures:
    """The sequences of a cache of tokens; each one's features are computed by a pass of the target when it is read.

    It takes the time of one prefill per sequence and epoch, and no disk.
    """

    def __init__(self, cache: FeatureCache, engine: Engine, count: int) -> None:
        """Use slot 0 of `engine`, which gives `count` hidden states as features, the last one last.

        Raises:
            PrismError: a sequence is longer than the engine's context.
        """
        longest = int(cache.lengths.max())
        if longest > engine.limits.context:
            raise PrismError(
                f"a sequence of {cache.directory} has {longest} tokens but the engine holds {engine.limits.context}: "
                "lower --max-prompt-tokens or --max-new-tokens and generate again"
            )
        self._cache = cache
        self._engine = engine
        self._count = count
        self.directory: Path = cache.directory
        self.greedy: np.ndarray = cache.greedy

    @property
    def roots(self) -> np.ndarray:
        """As `FeatureCache.roots`."""
        return self._cache.roots

    @property
    def data_sha256(self) -> str:
        """As `FeatureCache.data_sha256`."""
        return self._cache.data_sha256

    def token_counts(self, indices: np.ndarray, vocab_size: int) -> np.ndarray:
        """As `FeatureCache.token_counts`."""
        return self._cache.token_counts(indices, vocab_size)

    def sequence(self, index: int) -> FeatureSequence:
        """As `FeatureCache.sequence`."""
        known = self._cache.sequence(index)
        inputs, chunk = known.tokens[:-1], self._engine.limits.tokens_per_call
        parts = []
        for start in range(0, len(inputs), chunk):
            batch = TokenBatch.one_row(inputs[start : start + chunk].to(self._engine.device), start)
            parts.append(self._engine.forward(batch, "none").features[0].to("cpu", torch.bfloat16))
        return FeatureSequence.of(known.tokens, torch.cat(parts), self._count, known.prompt_length, known.greedy)
