"""`transformers` generate on the CPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from prism_trt.bench.peers.timing import Timing


class _Clock(BaseStreamer):
    """Notes when each token arrives; the first call of `put` carries the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class TransformersPeer:
    """A Hugging Face directory run by `generate` with its default attention and cache."""

    version: str = transformers.__version__

    def __init__(self, name: str, path: Path, dtype: torch.dtype) -> None:
        self.name = name
        logging.disable_progress_bar()
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self._model.generation_config.eos_token_id = None

    def decode(self, prompt: list[int], tokens: int) -> Timing:
        """Greedy decoding of exactly `tokens` tokens."""
        clock = _Clock()
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
            )
        first, last = clock.times[1], clock.times[-1]
        return Timing(output[0, len(prompt) :].tolist(), first - start, last - first)

    def time_pass(self, tokens: list[int], context: int) -> float:
        """See `prism_trt.bench.peers.timing.Peer.time_pass`."""
        ids = torch.tensor([tokens])
        with torch.inference_mode():
            past = self._model(ids[:, :context], use_cache=True, logits_to_keep=1).past_key_values if context else None
            start = time.perf_counter()
            self._model(ids[:, context:], past_key_values=past, use_cache=True, logits_to_keep=0 if context else 1)
        return time.perf_counter() - start
